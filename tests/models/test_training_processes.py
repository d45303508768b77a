"""A training that is killed, and one in two processes, are the same training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.errors import CorpusError
from models.training import Pretrained, train_captioner
from models.training_log import Entry, TrainingLog
from tests.models.test_training import bert, pairs  # noqa: F401 - a fixture
from tests.models.training_process import EVERY_STEP, NO_DROPOUT

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("training_process.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Gradients are summed in another order, in float32: 4e-7 here. A code chosen otherwise for it would move a loss more.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def curve(bert: str, tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:  # noqa: F811
    """Of one process that nobody disturbs."""
    work = tmp_path_factory.mktemp("whole")
    train_captioner(NO_DROPOUT, EVERY_STEP, pairs(), pairs(1), Pretrained(bert), work, progress=lambda _: None)
    return TrainingLog(work / "log.jsonl").read()


def losses(entries: list[Entry]) -> list[tuple[str, int, float, float, int]]:
    return [(e.phase, e.step, e.language_loss, e.commitment_loss, e.codes_used) for e in entries]


def on_cpus(command: list[str], work: Path, bert: str) -> list[Entry]:  # noqa: F811
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(work), bert], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return TrainingLog(work / "log.jsonl").read()


def test_a_training_killed_in_the_middle_goes_on_with_the_same_curve(
    curve: list[Entry], bert: str, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    log = TrainingLog(tmp_path / "log.jsonl")
    command = [sys.executable, str(SCRIPT), str(tmp_path), bert]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(log.read()) < 9 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = len(log.read())

    train_captioner(NO_DROPOUT, EVERY_STEP, [], [], Pretrained(bert), tmp_path, progress=lambda _: None)

    assert process.returncode == -signal.SIGKILL and 9 <= killed_at < len(curve)
    assert losses(log.read()) == losses(curve)


def test_two_processes_learn_what_one_learns(curve: list[Entry], bert: str, tmp_path: Path) -> None:  # noqa: F811
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]

    together = on_cpus(two, tmp_path / "two", bert)

    if torch.cuda.is_available():
        curve = on_cpus([sys.executable, str(SCRIPT)], tmp_path / "one", bert)
    assert [(e.phase, e.step) for e in together] == [(e.phase, e.step) for e in curve]
    assert [e.language_loss for e in together] == pytest.approx([e.language_loss for e in curve], rel=TOLERANCE)
    assert [e.commitment_loss for e in together] == pytest.approx([e.commitment_loss for e in curve], rel=TOLERANCE)


def test_a_folder_of_another_training_is_refused(bert: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "settings.json").write_text("{}")

    with pytest.raises(CorpusError, match="other settings"):
        train_captioner(NO_DROPOUT, EVERY_STEP, pairs(), [], Pretrained(bert), tmp_path)
