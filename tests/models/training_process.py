"""A training in a process of its own, for tests that kill it or start two: `training_process.py WORK BERT`."""

import sys
from dataclasses import replace
from pathlib import Path

from models.threads import set_thread_environment

set_thread_environment()

import torch  # noqa: E402

from models.training import Pretrained, train_captioner  # noqa: E402
from tests.models.test_training import CONFIG, QUICK, pairs  # noqa: E402

# a checkpoint a step, and no dropout: the processes of a pair draw it each for itself
EVERY_STEP = replace(QUICK, checkpoint_every_s=0.0, epochs_noisy=8, epochs_matching=0, accumulation=1)
NO_DROPOUT = replace(CONFIG, dropout=0.0)

if __name__ == "__main__":
    torch.set_num_threads(1)
    work, bert = Path(sys.argv[1]), sys.argv[2]
    train_captioner(NO_DROPOUT, EVERY_STEP, pairs(), pairs(1), Pretrained(bert), work)
