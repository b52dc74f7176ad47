"""
The READMEs are true: what they name is there, and their commands work.

    python tests/test_readme.py      run every command of both READMEs, shortened, in a copy

Commands are the lines of code blocks that begin with python, torchrun or pip (behind a $ or not),
and such text in backticks. Long ones get flags that end them after a few steps. What needs a
download, a GPU or several machines has a comment <!-- not run here: why --> in the line before its
block, or in its own line, and is listed at the end.
"""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / 'README.md', ROOT / 'README.zh.md', ROOT / 'tests' / 'bench' / 'README.md']
SCRIPTS = ('model', 'train', 'sample', 'prepare_data')
NOT_RUN = re.compile('<!-- not run here: (.*?) -->')
COMMAND = re.compile(r'(?:\$ )?((?:python|torchrun|pip|unzip|printf) .*)')
SHORTER = {  # flags behind those of the README: the last one counts
    'tests/bench/generate.py': '--rounds 1 --shapes 1x16',
    'tests/bench/': '--quick',
    'tests/known_bugs.py': '-k tied',
    'train.py': '--max_iters 4 --eval_interval 4 --eval_iters 1 --log_interval 4 '
                '--sample_tokens 5 --warmup_iters 1',
    'out-en-de --score': '--max_new_tokens 5'}

def commands(path):
    """(command, why it is not run, or '') of every command of a README, in order."""
    found, inside, reason = [], False, ''
    for line in path.read_text(encoding='utf-8').replace('\\\n', ' ').split('\n'):
        marked = NOT_RUN.search(line)
        if line.startswith('```'):
            inside = not inside
            reason = reason if inside else ''
        elif inside and (command := COMMAND.match(line.strip())):
            found.append((command[1].split(' # ')[0].strip(), reason))
        elif not inside:
            found += [(command, marked[1] if marked else '')
                      for command in re.findall('`((?:python|torchrun) [^`]+)`', line)]
            reason = marked[1] if marked else reason if not line.strip() else ''
    return found

def shortened(command):
    """The command, ended soon."""
    if any(flag in command for flag in ('--help', '--dry_run', '--eval_only', '--quick')):
        return command
    return ' '.join([command, *[flags for name, flags in SHORTER.items() if name in command][:1]])

def names_in(path):
    """The functions, classes and constants that a source file defines."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding='utf-8'))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found

def test_the_map_from_theory_to_code_names_what_is_there():
    """Each name of the column `where`, and each `Class.method`, stands in a source file."""
    text = READMES[0].read_text(encoding='utf-8')
    rows = re.search(r'## From theory to code\n.*?\n(\|.*?)\n\n', text, re.S)[1].splitlines()[2:]
    ours = set().union(*(names_in(f'{name}.py') for name in SCRIPTS),
                       names_in('tests/bench/history.py'), names_in('tests/bench/scaling.py'))
    assert len(rows) >= 30
    for row in rows:
        concept, where, _ = row.strip('| ').split(' | ', 2)
        for name in re.findall('`([^`]+)`', where):
            assert name in ours, f'{concept}: there is no {name}'
    sources = ''.join((ROOT / f'{name}.py').read_text(encoding='utf-8') for name in SCRIPTS)
    for path in READMES:
        text = path.read_text(encoding='utf-8')
        for name in re.findall(r'`[A-Z]\w+\.(\w+)`', text):
            assert name in ours, f'{path.name}: there is no {name}'
        for title in re.findall(r'(?<!\*)\*([A-Z][^*]+)\*(?!\*)', text):  # of a section
            assert f'# {title}'.replace('\n', ' ') in sources, f'{path.name}: no section {title}'

def test_every_flag_that_is_named_exists():
    """In either language, also in prose."""
    import model
    import prepare_data
    import sample
    import train
    known = {f.name for cls in (model.Config, *(m.Settings for m in (prepare_data, sample, train)))
             for f in dataclasses.fields(cls)}
    others = {'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'no-deps', 'help'}
    for path in (ROOT / 'tests').glob('**/*.py'):
        others |= set(re.findall(r"add_argument\('--([\w-]+)'", path.read_text(encoding='utf-8')))
    for path in READMES:
        text = path.read_text(encoding='utf-8')
        for flag in set(re.findall(r'(?<![\w<!-])--([a-z][\w-]*)', text)):
            plain = flag.replace('-', '_')
            assert plain in known or plain.removeprefix('no_') in known or flag in others, \
                f'{path.name}: --{flag}'

def test_the_family_is_the_table_of_the_code():
    import model
    for path in READMES[:2]:
        rows = re.findall(r'^\| `(\w+)` (\d{4}) \|', path.read_text(encoding='utf-8'), re.M)
        assert {name for name, _ in rows} == {name for name in model.PRESETS if '-' not in name}
        assert rows[0] == ('lstm', '1997') and rows[-1] == ('nano', '2026')

def test_known_bugs_and_exercises_have_their_places():
    """The old text of a change occurs once, or putting it in would mean nothing."""
    from exercises import SOLUTIONS
    from known_bugs import BUGS
    places = [(file, old) for _, _, file, old, *_ in BUGS]
    places += [place[:2] for _, changes in SOLUTIONS.values() for place in changes]
    for file, old in places:
        assert (ROOT / file).read_text(encoding='utf-8').count(old) == 1, old

def test_readmes_are_short():
    for path, most in zip(READMES, (300, 240)):
        assert len(path.read_text(encoding='utf-8').splitlines()) <= most, path.name

def main():
    shared = Path(os.environ.get('PLAINFORMER_SHARED', ROOT.parent / 'shared'))
    asked = {}
    for path in READMES[:2]:
        for command, reason in commands(path):
            asked.setdefault(command, reason)
    failed, left_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        for path in [*ROOT.glob('*.py'), ROOT / 'tests', ROOT / 'requirements.txt']:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder, path.name))
        for path in (shared / 'data').iterdir():  # as the READMEs name them
            name = path.name.replace('tinyshakespeare', 'shakespeare').replace('multi30k.', '')
            os.symlink(path, Path(folder, name))
        env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(shared / 'tiktoken_cache')}
        for n, (command, reason) in enumerate(asked.items(), 1):
            command = re.sub(r'^pip install -r .*?&& ', '', command)  # they are installed already
            if reason or '-m pytest' in command:
                left_out.append((command, reason or 'run by itself'))
                continue
            print(f'{n} of {len(asked)}: {shortened(command)}', flush=True)
            done = subprocess.run(['bash', '-c', shortened(command)], cwd=folder, env=env,
                                  capture_output=True, encoding='utf-8', timeout=600)
            if done.returncode:
                failed.append(command)
                print(f'FAILED with {done.returncode}:\n{done.stdout[-2000:]}\n'
                      f'{done.stderr[-2000:]}', flush=True)
    print('\nnot run here:', *(f'    {command}    ({why})' for command, why in left_out), sep='\n')
    if failed:
        sys.exit('\n'.join(['these commands failed:', *failed]))

if __name__ == '__main__':
    main()
