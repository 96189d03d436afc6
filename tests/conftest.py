"""Shared by all tests: one thread, unless OMP_NUM_THREADS says more, and the real data, if any."""

import gc
import os
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # others are processes, to be started
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test waits for a network

import pytest


def pytest_configure(config):
    """Tests see no GPU, so that they are the same on every machine; `pytest -m cuda` does."""
    if "cuda" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Tests marked `long` begin first, or one process would wait for another's at the end."""
    items.sort(key=lambda item: "long" not in item.keywords)


def pytest_collection_finish(session):
    """What is imported is for good: garbage collections need not walk it again, and are fast."""
    import torch  # not above: the process that hands out the tests needs none of it

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    gc.freeze()


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """A run's picture takes a third of a short run's time: only tests marked `picture` draw it."""
    if "picture" not in request.keywords:
        monkeypatch.setattr("harness.log.draw_curve", lambda *_: None)


@pytest.fixture
def shared():
    """Folder with real task data and real small models; tests that use it skip where it is not."""
    if not (SHARED / "models" / "tinystories656k").is_dir():
        pytest.skip("no folder ../shared with real data and models")
    return SHARED


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with model/, train.jsonl and test.jsonl: `models.write_task`. Not to be changed."""
    from models import write_task

    path = tmp_path_factory.mktemp("task")
    write_task(path)
    return path
