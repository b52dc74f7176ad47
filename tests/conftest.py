"""What all tests share: where the project and its test texts lie, seeds, and tiny models."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny models: threads would only wait for each other

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

hypothesis.settings.register_profile('plain', deadline=None, derandomize=True, database=None, max_examples=25,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('plain')


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU; deselected where there is none')


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU are deselected without one, not skipped: a skip would hide what is missing."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker('gpu')]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def shared():
    """The folder of real texts beside the project. Strangers who do not have it skip the tests that need it."""
    folder = Path(os.environ.get('PLAINFORMER_SHARED', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip('needs the folder shared/ beside the project, or PLAINFORMER_SHARED')
    return folder


def command(script, *flags, cwd, status=0, **kwargs):
    """Run `python script flags...` in cwd as a user would; returns the finished process."""
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd, capture_output=True,
                            encoding='utf-8', timeout=300, **kwargs)
    assert result.returncode == status, f'{script} {flags} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}'
    return result
