"""`python -m flash.evaluation`: benchmarks of lm-evaluation-harness on a model or its program."""

import sys

from flash.config import entry
from flash.evaluation.run import evaluate
from flash.evaluation.settings import EvaluateSettings

if __name__ == "__main__":
    sys.argv[0] = "-m flash.evaluation"  # how people start it again
    entry(EvaluateSettings, evaluate)
