"""
What a training survives, each promise once: it is killed, interrupted, out of disk or without a
reader, and goes on bit for bit; and what a user can get wrong is one line, with status 2.

Commands run in processes of their own, forked from one that has imported torch already.
"""

import dataclasses
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from operator import delitem, setitem
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, WIDE, as_words, command, fit, log_of, prepared, read, same_run

import prepare_data
import train

STEADY = dict(WIDE, dropout=0.1, lr_decay_iters=24, eval_interval=2)

def run_script(script, words, folder, stdout, limit):
    """`python script words...` in this process; what it prints goes to two files in folder."""
    os.chdir(folder)
    for number, name in ((1, stdout), (2, 'stderr')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, 'w', encoding='utf-8', closefd=False)
                              for number in (1, 2))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *words]
    sys.modules['matplotlib'] = None
    runpy.run_path(str(ROOT / script), run_name='__main__')

@pytest.fixture(scope='module')
def forks():
    """A process that has imported what a run needs; each start of a run is a fork of it."""
    context, path = multiprocessing.get_context('forkserver'), os.environ.get('PYTHONPATH')
    context.set_forkserver_preload(['test_robust'])
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT / 'tests'), str(ROOT)])
    yield context
    os.environ.pop('PYTHONPATH') if path is None else os.environ.update(PYTHONPATH=path)

@pytest.fixture
def start(forks, tmp_path):
    """start(flags) -> a process that runs train.py; those that still run are killed at the end."""
    processes = []

    def begin(flags, folder=tmp_path, stdout='stdout', limit=0):
        process = forks.Process(target=run_script, args=(
            'train.py', as_words(flags), str(folder), stdout, limit))
        process.start()
        processes.append(process)
        return process
    yield begin
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()

def wait_for(condition, process):
    """Until a condition holds; the process must be alive so long."""
    while not condition():
        assert process.is_alive(), f'it ended with {process.exitcode}'
        time.sleep(0.01)

def end_of(process):
    process.join(120)
    return process.exitcode

def text_of(folder, name):
    path = Path(folder, name)
    return path.read_text(encoding='utf-8') if path.exists() else ''

def steps_logged(out):
    return len(log_of(out)) if Path(out, 'log.csv').exists() else 0

# -----------------------------------------------------------------------------
# Ends, and how a run goes on

@pytest.mark.parametrize('dataset, preset, flags', [
    ('d', 'gpt2', dict(optimizer='muon', gradient_accumulation_steps=2)), ('d', 'lstm', {}),
    ('text', 'bert', dict(optimizer='muon')), ('text', 't5', dict(dtype='bfloat16')),
    ('d', 'nano', dict(dtype='float16')), ('classify', 'bert', dict(freeze='tokens embed')),
    ('seq2seq', 'gpt2', dict(batch_size=5)), ('tag', 'llama', dict(adversarial=0.1))])
def test_a_resumed_run_is_the_unbroken_run(folders, tmp_path, dataset, preset, flags):
    """With dropout, across epochs, whatever is trained (b17); all settings come from ckpt.pt."""
    flags = {**STEADY, 'preset': preset, 'dataset': folders / dataset, 'eval_interval': 3, **flags}
    fit(tmp_path / 'whole', **{**flags, 'max_iters': 12})
    fit(tmp_path / 'old', **{**flags, 'max_iters': 3})
    shutil.move(tmp_path / 'old', tmp_path / 'broken')  # the folder may move in between
    fit(tmp_path / 'broken', init_from='resume', max_iters=6)
    fit(tmp_path / 'broken', init_from='auto', max_iters=12)
    same_run(tmp_path / 'broken', tmp_path / 'whole')

def test_a_resumed_run_writes_where_it_was_read(d, tmp_path, monkeypatch):
    """A moved or copied out folder goes on where it is now, and the old place stays as it is."""
    fit(tmp_path / 'a/out', d, max_iters=2)
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    monkeypatch.chdir(tmp_path / 'b')
    saved = read('out')
    saved['progress'] |= {'seconds': 1e6, 'best': (9, 9)}
    torch.save(saved, 'out/ckpt.pt')
    os.unlink('out/best.pt')  # it was not copied: one is written, however good another was
    with pytest.raises(SystemExit) as _kept:  # with all that its frames hold, as in a notebook
        train.main(['--init_from=resume', '--max_iters=3'])
    with pytest.raises(SystemExit):
        train.main(['--init_from=resume', '--max_iters=4'])
    assert read('out')['progress']['step'] == 4 and read('out')['progress']['seconds'] > 1e6
    assert read(tmp_path / 'a/out')['progress']['step'] == 2 and os.path.exists('out/best.pt')

def test_what_is_still_to_be_evaluated_is_evaluated_on_resume(d, tmp_path):
    """The last step of a run, too, or best.pt could become worse; in another precision here."""
    fit(tmp_path, d, max_iters=3, eval_interval=2)
    fit(tmp_path, init_from='resume', max_iters=5, dtype='float16')
    assert [int(row['step']) for row in log_of(tmp_path)] == [0, 2, 3, 4, 5]

@pytest.mark.parametrize('preset', ['gpt2', 'bert'])
def test_kill_9_at_any_moment_loses_nothing(folders, tmp_path, start, preset):
    """Killed at drawn moments and started again with --init_from auto: the unbroken run."""
    flags = {**STEADY, 'preset': preset, 'dataset': folders / 'text', 'max_iters': 24}
    rng, kills, out = random.Random(preset), 0, tmp_path / 'broken'
    began = time.monotonic()
    fit(tmp_path / 'whole', **flags)
    seconds = time.monotonic() - began
    status = None
    while status != 0:
        process = start({**flags, 'init_from': 'auto', 'out_dir': out})
        if kills < 5:
            process.join(rng.uniform(0.1, 1) * seconds)
            process.kill()
            kills += process.exitcode is None
        status = end_of(process)
        assert status in (0, -signal.SIGKILL), text_of(tmp_path, 'stderr')
    same_run(out, tmp_path / 'whole')
    assert not list(out.glob('*old*'))

@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGINT', 130), ('SIGHUP', 129)])
def test_a_signal_saves_and_ends_and_resume_goes_on(folders, tmp_path, start, name, status):
    """The step in progress is finished and saved; what follows is the unbroken run."""
    flags = {**STEADY, 'dataset': folders / 'd', 'eval_interval': 5}
    process = start({**flags, 'out_dir': 'out', 'max_iters': 10 ** 6})
    wait_for(lambda: steps_logged(tmp_path / 'out') >= 2, process)
    os.kill(process.pid, getattr(signal, name))
    assert end_of(process) == status
    step = read(tmp_path / 'out')['progress']['step']
    assert f'stopped at step {step}: go on with --init_from resume' in text_of(tmp_path, 'stdout')
    assert 'once more to end at once' in text_of(tmp_path, 'stderr')
    end = (step // 5 + 1) * 5
    fit(tmp_path / 'out', init_from='resume', max_iters=end)
    fit(tmp_path / 'whole', **{**flags, 'max_iters': end})
    same_run(tmp_path / 'out', tmp_path / 'whole')

def test_a_second_signal_ends_at_once(folders, tmp_path, start):
    """A step that takes long is not waited for, and the checkpoint before it is whole."""
    flags = {**WIDE, 'n_embd': 256, 'n_layer': 8, 'mlp_dim': 1024, 'batch_size': 1500,
             'dataset': folders / 'd', 'eval_iters': 1, 'out_dir': 'out', 'preset': 'bert'}
    process = start({**flags, 'max_iters': 10 ** 6})
    wait_for(lambda: Path(tmp_path, 'out/ckpt.pt').exists(), process)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: 'once more' in text_of(tmp_path, 'stderr'), process)
    os.kill(process.pid, signal.SIGHUP)  # ends nothing: a terminal that is closed may send two
    os.kill(process.pid, signal.SIGINT)  # of another kind
    assert end_of(process) == -signal.SIGINT
    assert read(tmp_path / 'out')['progress']['step'] == 0

def test_a_signal_while_a_line_is_written_saves(d, tmp_path, monkeypatch):
    """As on a terminal that stands still: then nothing can be written to standard error."""
    class Screen(io.StringIO):
        def write(self, text):
            if 'iter 2' in text:
                signal.raise_signal(signal.SIGTERM)
            if self is sys.stderr:
                raise RuntimeError('reentrant call')

    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, Screen())
    with pytest.raises(SystemExit, match='143'):
        train.main(as_words({**TINY, 'dataset': d, 'out_dir': tmp_path, 'log_interval': 1}))
    assert read(tmp_path)['progress']['step'] == 3

def test_a_full_disk_leaves_the_old_checkpoint(folders, tmp_path, start):
    """One line that names the file, status 2, and nothing half written; later the run goes on."""
    flags = {**STEADY, 'dataset': folders / 'd', 'out_dir': tmp_path / 'out'}
    fit(**{'out': flags['out_dir'], **flags, 'max_iters': 2})
    files = lambda: {p.name: p.read_bytes() for p in (tmp_path / 'out').glob('[!.]*')}
    before = files()
    process = start({'init_from': 'resume', 'out_dir': flags['out_dir'], 'max_iters': 24},
                    limit=len(before['ckpt.pt']) // 2)
    assert end_of(process) == 2
    line, = text_of(tmp_path, 'stderr').splitlines()
    assert 'ckpt.pt cannot be written' in line and 'make room' in line
    assert before == files()
    fit(tmp_path / 'out', init_from='resume', max_iters=24)
    fit(tmp_path / 'whole', **{**flags, 'max_iters': 24, 'out_dir': tmp_path / 'whole'})
    same_run(tmp_path / 'out', tmp_path / 'whole')

def test_a_folder_in_use_is_refused_and_the_lock_of_a_killed_run_does_not_count(d, tmp_path, start):
    """F19: the line names the process; neither a new run nor a resume touches its files."""
    flags = {**TINY, 'dataset': d, 'out_dir': tmp_path / 'out', 'eval_interval': 10 ** 6}
    process = start({**flags, 'max_iters': 10 ** 6})
    wait_for(lambda: steps_logged(tmp_path / 'out'), process)
    before = (tmp_path / 'out/ckpt.pt').read_bytes()
    for more in ({'seed': 7}, {'init_from': 'resume'}):
        with pytest.raises(ValueError, match=f'in use by process {process.pid}'):
            train.main(as_words({**flags, **more}))
    assert (tmp_path / 'out/ckpt.pt').read_bytes() == before
    assert not list((tmp_path / 'out').glob('*old*'))
    process.kill()
    process.join()
    (tmp_path / f'out/ckpt.pt.{process.pid}.tmp').touch()  # it was killed while it saved
    with mock.patch('fcntl.flock', side_effect=OSError('this drive has no locks')):
        assert fit(tmp_path / 'out', init_from='resume', max_iters=2)['progress']['step'] == 2
    assert not list((tmp_path / 'out').glob('*.tmp'))

def test_output_that_nobody_reads_ends_no_training(d, tmp_path, start):
    """F20: as in `python train.py | head -1`, the work is the checkpoint."""
    os.mkfifo(tmp_path / 'pipe')
    process = start({**TINY, 'dataset': d, 'max_iters': 40, 'log_interval': 1, 'out_dir': 'out',
                     'eval_interval': 20}, stdout='pipe')
    with open(tmp_path / 'pipe', encoding='utf-8') as pipe:
        assert 'parameters' in pipe.readline(), text_of(tmp_path, 'stderr')
    assert end_of(process) == 0 and text_of(tmp_path, 'stderr') == ''
    assert read(tmp_path / 'out')['progress']['step'] == 40
    flags = {**TINY, 'dataset': d, 'max_iters': 2, 'out_dir': 'full'}
    for _ in range(2):  # the second run gives the files of the first another name
        assert end_of(start(flags, stdout='/dev/full')) == 0
    assert read(tmp_path / 'full')['progress']['step'] == 2

def test_readers_see_only_whole_checkpoints(d, tmp_path, start):
    """Who opens ckpt.pt and best.pt while they are written again and again finds a whole file."""
    out = tmp_path / 'out'
    process = start({**TINY, 'dataset': d, 'max_iters': 40, 'eval_interval': 1, 'out_dir': out})
    wait_for(lambda: (out / 'best.pt').exists(), process)
    steps = []
    while process.is_alive():
        for name in ('best.pt', 'ckpt.pt'):
            steps.append(read(out, name)['progress']['step'])
    assert end_of(process) == 0 and len(set(steps)) > 3
    assert steps[1::2] == sorted(steps[1::2])

def test_the_command_runs_outside_of_the_project(d, tmp_path):
    """As a user calls it; --dataset NAME is the folder data/NAME where the user is."""
    shutil.copytree(d, tmp_path / 'data/mine')
    words = as_words({**TINY, 'dataset': 'mine', 'max_iters': 1})
    result = command('train.py', *words, cwd=tmp_path)
    assert 'done: 1 steps' in result.stdout and result.stderr == ''
    assert {*os.listdir(tmp_path)} == {'data', 'out'}
    assert {'ckpt.pt', 'best.pt', 'config.toml'} <= {*os.listdir(tmp_path / 'out')}

# -----------------------------------------------------------------------------
# What is wrong is one line

@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """refusal(words) -> the one line with which the command ends; it must not write anything."""
    def snapshot():
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.name != '.lock'}

    def run(words, folder=tmp_path):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, words)])
        before = snapshot()
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            prepare_data.run(train.main)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and len(err.splitlines()) == 1, (words, out, err)
        assert err.startswith('train.py: error: ') and snapshot() == before, (words, err)
        return err
    return run

BAD_TEXTS = {'dataset': 'nowhere', 'init_from': 'not/a/file.pt', 'config': 'nowhere.toml',
             'freeze': 'all', 'window': '-1', 'rope_scaling': 'llama9', 'objective': 'skipgram',
             'best_by': 'beauty', 'task': 'sing'}

def bad_values(f):
    """Values that a field of a dataclass of flags does not allow, as a user may write them."""
    rules = prepare_data.LIMITS.get(f.type, {}) | f.metadata
    if f.name in BAD_TEXTS:
        return [BAD_TEXTS[f.name]]
    if rules['choices']:
        return ['foo']
    values = {int: ['1e4', '1.5', 'x', ''], float: ['nan', 'inf', 'x'], bool: ['maybe']}.get(
        f.type, [])
    for bound, beyond in (('low', -1), ('high', 1), ('above', 0), ('below', 0)):
        if rules.get(bound) is not None:
            values.append(rules[bound] + beyond)
    return values

def test_a_bad_value_of_any_flag_is_one_line_that_names_it(d, tmp_path, refusal):
    """A property over all fields: one value beyond each rule; nothing is written."""
    tried, fields = set(), dataclasses.fields(train.Settings) + dataclasses.fields(train.Config)
    for f in fields:
        for value in bad_values(f):
            line = refusal([f'--dataset={d}', '--device=cpu', f'--{f.name}={value}'])
            named = BAD_TEXTS.get(f.name, f.name)
            assert f.name in line or named in line, f'{f.name}={value}: {line}'
            tried.add(f.name)
    untried = {f.name for f in fields} - tried
    assert untried <= {'out_dir'}, untried

@pytest.mark.parametrize('flags, named', [
    ('--lerning_rate=1', 'did you mean --learning_rate?'), ('out', 'out belongs to no flag'),
    ('--lr=1', '--lr=1 belongs to no flag: see'), ('--lr_decay_iters=5', 'learned at --min_lr 0'),
    ('--max_iters', '--max_iters'), ('--n_head=5', 'n_head=5'), ('--n_labels=2', '--n_labels 2: '),
    ('--vocab_size=10', 'than vocab_size=10'), ('--block_size=9999', 'block_size + 1 = 10000'),
    ('--init_from=resume', 'there is no out/ckpt.pt'), ('--eval_only', 'no checkpoint out'),
    ('--preset=gpt2 --muon_momentum=0.5', '--muon_momentum: only --optimizer muon reads it'),
    ('--freeze=embed --adversarial=0.1', '--freeze embed'), ('--freeze=trunk', '--freeze trunk'),
    ('--freeze=tokens.weight --adversarial=0.1', '--freeze tokens.weight keeps'),
    ('--freeze=weight --no-bias', '--freeze weight: '), ('--task=qa', "has '': leave the flag out"),
    ('--freeze=blocks.9.', '--freeze blocks.9.: '), ('--preset=t5 --block_size=3', 'least 4'),
    ('--preset=bert --block_size=4', 'needs at least 5'), ('--best_by=bleu', '--best_by bleu'),
    ('--objective=masked_lm', '--objective masked_lm: a gpt learns text by causal_lm'),
    ('--objective=supervised', '--objective supervised: a gpt learns text by causal_lm'),
    ('--config=bad.toml', '--config bad.toml'), ('--out_dir=bad.toml', 'bad.toml: '),
    ('--config=unknown.toml', 'did you mean --batch_size?'),
    ('--config=list.toml', "--batch_size: invalid int value: '[1, 2]'"),
    ('--config=all.toml --preset=nano', 'all choices of gpt2: leave --preset out'),
    ('--dataset=pytopics', 'prepare_data.py --dataset pytopics')])
def test_a_bad_command_line_is_one_line_that_names_what_is_wrong(
        d, tmp_path, refusal, flags, named):
    """Flags that do not exist, or do not fit each other, the data or the model."""
    (tmp_path / 'bad.toml').write_text('batch_size = \n')
    (tmp_path / 'unknown.toml').write_text('batchsize = 3\n')
    (tmp_path / 'all.toml').write_text('preset = "gpt2"\narch = "gpt"\n')
    (tmp_path / 'list.toml').write_text('\ufeffbatch_size = [1, 2]\n', encoding='utf-8')
    line = refusal([*([] if 'dataset' in flags else [f'--dataset={d}']), *flags.split()])
    assert named in line, line

@pytest.fixture(scope='module')
def trained(folders, tmp_path_factory):
    """Out folders of short runs, to copy."""
    root = tmp_path_factory.mktemp('trained')
    for name, flags in {'d': {}, 'classify': WIDE}.items():
        fit(root / name, **{**TINY, **flags, 'dataset': folders / name, 'max_iters': 2})
    return root

@pytest.mark.parametrize('resumed', [True, False])
def test_a_flag_that_contradicts_a_checkpoint_is_refused(trained, tmp_path, refusal, resumed):
    """Its weights depend on it; on resume also the optimizer and the examples (F22)."""
    shutil.copytree(trained / 'd', tmp_path / 'out')
    words = ['--n_layer=3', '--norm=rmsnorm', '--preset=bert', '--vocab_size=9', '--block_size=64']
    if resumed:
        words += ['--block_size=4', '--freeze=embed', '--objective=masked_lm', '--optimizer=muon',
                  '--seed=1', '--batch_size=8', '--gradient_accumulation_steps=2', '--best_by=loss']
    for word in words:
        line = refusal([f'--init_from={"resume" if resumed else "out"}', '--max_iters=9', word])
        assert word[2:].split('=')[0] in line

class Code:
    """Code in a pickle, which would make a folder."""

    def __reduce__(self):
        return os.mkdir, ('hacked',)

FOREIGN = {  # what becomes of the bytes of ckpt.pt
    'code': lambda whole: pickle.dumps(Code()), 'text': lambda whole: b'Once upon a time\n' * 99,
    **{str(n): lambda whole, n=n: whole[:len(whole) * n // 1000] for n in (0, 1, 500, 999)}}
CHANGED = {  # what becomes of the parts in it
    'a list': lambda c: [1, 2], 'code in a zip': lambda c: {**c, 'more': Code()},
    'no optimizer': lambda c: delitem(c, 'optimizer'), 'no config': lambda c: delitem(c, 'config'),
    'another layer': lambda c: setitem(c['config'], 'n_layer', 2),
    'NaN': lambda c: setitem(c['model']['tokens.weight'], (3, 3), math.nan),
    'a shape': lambda c: setitem(c['model'], 'tokens.weight',
                                 c['model']['tokens.weight'][:, 1:].clone())}

@pytest.mark.parametrize('how', [*FOREIGN, *CHANGED])
def test_a_damaged_checkpoint_is_one_line_that_names_it(trained, tmp_path, refusal, how):
    """Cut anywhere, foreign, or without a part; no code in it runs; it stays as it is."""
    shutil.copytree(trained / 'd', tmp_path / 'out')
    path = tmp_path / 'out/ckpt.pt'
    if how in FOREIGN:
        path.write_bytes(FOREIGN[how](path.read_bytes()))
    else:
        saved = torch.load(path, weights_only=True)
        torch.save(CHANGED[how](saved) or saved, path)
    assert 'out/ckpt.pt' in refusal(['--init_from=resume', '--max_iters=9'])
    assert not (tmp_path / 'hacked').exists()

def broken_data(folder, how):
    name, change = how.split()
    data, meta = (folder / name).read_bytes(), json.loads((folder / 'meta.json').read_bytes())
    (folder / name).unlink()
    if change != 'gone':
        (folder / name).write_bytes({
            'half': data[:len(data) // 2 // 2 * 2], 'text': b'Once upon a time',
            'old': json.dumps({**meta, 'format': 'plainformer data 1'}).encode(),
            'bare': json.dumps({'format': meta['format']}).encode(),
            'id': data[:20] + b'\xff\xff' + data[22:]}[change])

@pytest.mark.parametrize('dataset, how', [
    ('d', 'meta.json half'), ('d', 'meta.json old'), ('d', 'meta.json bare'), ('d', 'val.bin half'),
    ('d', 'train.bin half'), ('d', 'train.bin gone'), ('d', 'tokenizer.json gone'),
    ('d', 'tokenizer.json half'), ('d', 'tokenizer.json text'), ('classify', 'val.jsonl gone'),
    ('classify', 'train.jsonl half'), ('classify', 'train.jsonl text')])
def test_a_damaged_data_folder_is_one_line_that_names_it(folders, tmp_path, refusal, dataset, how):
    shutil.copytree(folders / dataset, tmp_path / 'data')
    broken_data(tmp_path / 'data', how)
    line = refusal(as_words({**WIDE, 'dataset': 'data', 'out_dir': 'out'}))
    assert 'data' in line

def test_an_id_beyond_the_vocabulary_stops_a_run(folders, tmp_path):
    """b6: a damaged train.bin is named by the first step that reads the id."""
    shutil.copytree(folders / 'd', tmp_path / 'data')
    broken_data(tmp_path / 'data', 'train.bin id')
    with pytest.raises(ValueError, match='ids up to 65535'):
        fit(tmp_path / 'out', tmp_path / 'data', max_iters=200, eval_interval=1)

@pytest.mark.parametrize('way', ['init_from', 'resume', 'eval_only'])
def test_data_of_another_tokenizer_are_refused(trained, tmp_path, refusal, way):
    """b6: the same ids would mean other text; the line names the folder and the checkpoint."""
    shutil.copytree(trained / 'd', tmp_path / 'out')
    other = prepared(tmp_path / 'other', '狐 犬 abc.\n' * 60, tokenizer='char')
    words = {'init_from': ['--init_from=out', '--out_dir=new'], 'resume': ['--init_from=resume'],
             'eval_only': ['--eval_only']}[way]
    line = refusal([*words, f'--dataset={other}'])
    assert f'{other} was encoded with another tokenizer than out' in line and '--tokenizer ' in line

def test_a_run_goes_on_with_the_same_data_only(trained, folders, tmp_path, refusal):
    shutil.copytree(trained / 'd', tmp_path / 'out')
    text = Path(f"{folders / 'd'}.train.txt").read_text(encoding='utf-8')
    other = prepared(tmp_path / 'other', text[::-1], text[:400], tokenizer=str(folders / 'd'))
    line = refusal(['--init_from=resume', f'--dataset={other}', '--max_iters=9'])
    assert 'learned from other data' in line
    other = prepared(tmp_path / 'cut', text, text[:401], tokenizer=str(folders / 'd'))
    meta = json.loads((folders / 'd/meta.json').read_text(encoding='utf-8'))
    path = Path(other, 'meta.json')  # the same bytes, cut elsewhere
    path.write_text(json.dumps(json.loads(path.read_text()) | {'sha256': meta['sha256']}))
    refusal(['--init_from=resume', f'--dataset={other}', '--max_iters=9'])
    shutil.copytree(trained / 'classify', tmp_path / 'c/out')
    rows = prepared(tmp_path / 'rows', 'x\t1\ny\t2\n' * 9, task='classify', block_size=40,
                    tokenizer=str(folders / 'classify'))
    line = refusal(['--eval_only', f'--dataset={rows}'], tmp_path / 'c')
    assert "'bad', '好'" in line and "'x', 'y'" in line
    fit(tmp_path / 'b/out', folders / 'qa', **{**WIDE, 'preset': 'bert', 'max_iters': 1})
    line = refusal(['--eval_only', '--objective=masked_lm'], tmp_path / 'b')
    assert 'is for text with the labels [], out for qa' in line
    line = refusal(as_words({**WIDE, 'dataset': folders / 'classify', 'block_size': 33}))
    assert 'an example of 34 tokens, more than block_size=33' in line
