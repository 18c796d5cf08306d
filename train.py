"""Continued pretraining: `python train.py +arch=flash_650m`."""

from flash.config import TrainSettings, entry
from flash.training.run import train

if __name__ == "__main__":
    entry(TrainSettings, train)
