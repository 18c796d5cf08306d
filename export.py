"""Export, prove and measure a model: `python export.py +arch=tiny_0`."""

from flash.cli import run

if __name__ == "__main__":
    run("export")
