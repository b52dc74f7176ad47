"""What the test files share: where the project lies, seeds, commands, and tensors compared."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # more threads slow tiny models down

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

signal.signal(signal.SIGINT, signal.default_int_handler)  # behind & and nohup they are ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile(
    'plain', deadline=None, derandomize=True, database=None, max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('plain')

def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU; deselected where there is none')

def pytest_collection_modifyitems(config, items):
    """Without a GPU its tests are deselected, not skipped: a skip would hide what is missing."""
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker('gpu')]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

@pytest.fixture(scope='session')
def shared():
    """The folder of real texts beside the project; without it, the tests that need it skip."""
    folder = Path(os.environ.get('PLAINFORMER_SHARED', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip('needs the folder shared/ beside the project, or PLAINFORMER_SHARED')
    return folder

# -----------------------------------------------------------------------------
# Commands and errors

def command(script, *flags, cwd, status=0, **kwargs):
    """Run `python script flags...` in cwd as a user would; returns the finished process."""
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=cwd,
                            capture_output=True, encoding='utf-8', timeout=300, **kwargs)
    assert result.returncode == status, (
        f'{script} {flags} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}')
    return result

def refused(script, *flags, cwd, **kwargs):
    """Run a command that has to end with status 2 and one line on stderr; returns that line."""
    lines = command(script, *flags, cwd=cwd, status=2, **kwargs).stderr.strip().splitlines()
    assert len(lines) == 1, '\n'.join(lines)
    return lines[0]

def one_line(error):
    """The message of an exception caught by pytest.raises, which must be one line."""
    message = str(error.value)
    assert message and '\n' not in message, f'not one line: {message}'
    return message

# -----------------------------------------------------------------------------
# Models and tensors

def tiny(preset, **changes):
    """A row of PRESETS at a size that takes milliseconds, without dropout."""
    from model import PRESETS
    c = PRESETS[preset]
    sizes = dict(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0,
                 n_kv_head=min(c.n_kv_head, 4), head_dim=min(c.head_dim, 12),
                 mlp_dim=min(c.mlp_dim, 40))
    return replace(c, **{**sizes, **changes})

def awake(model):
    """Give all weights random values, so that none is 0 or 1. Returns the model without dropout."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.25)
    return model.eval()

def close(a, b, tolerance=1e-5):
    """Equal up to rounding, relative to the largest value where that is above 1."""
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    allowed = tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert a.shape == b.shape, f'{tuple(a.shape)} and {tuple(b.shape)}'
    assert difference <= allowed, f'differ by {difference:.2e}, allowed {allowed:.0e}'

def same(a, b):
    """Equal bit for bit."""
    assert a.shape == b.shape, f'{tuple(a.shape)} and {tuple(b.shape)}'
    assert torch.equal(a, b), f'{(a != b).sum()} of {a.numel()} values differ'
