"""`python -m flash.evaluation`: run a benchmark suite on a model or its exported program."""

import sys

from flash.config import entry
from flash.evaluation.run import evaluate
from flash.evaluation.settings import EvaluateSettings

if __name__ == "__main__":
    sys.argv[0] = "-m flash.evaluation"  # shown in usage messages
    entry(EvaluateSettings, evaluate)
