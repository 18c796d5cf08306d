"""Export, prove and measure a model: `python export.py +arch=tiny_0`."""

from flash.config import ExportSettings, entry
from flash.export.run import export

if __name__ == "__main__":
    entry(ExportSettings, export)
