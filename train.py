"""Continued pretraining: `python train.py +arch=flash_650m`."""

from flash.cli import run

if __name__ == "__main__":
    run("train")
