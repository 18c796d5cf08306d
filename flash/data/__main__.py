"""`python -m flash.data prepare`: tokenise a mixture ahead, into shards."""

import sys

from flash.config import entry
from flash.data.prepare import prepare
from flash.data.settings import PrepareSettings

if __name__ == "__main__":
    if sys.argv[1:2] != ["prepare"]:
        sys.exit("usage: python -m flash.data prepare data=mixture [out=FOLDER] [key=value ...]")
    # What follows is for Hydra; the first is how people start it again.
    sys.argv[:2] = ["-m flash.data prepare"]
    entry(PrepareSettings, prepare)
