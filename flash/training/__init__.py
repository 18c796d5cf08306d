"""Training: settings, LightningModule, callbacks, and the one call that runs them."""
