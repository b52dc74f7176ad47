"""
Put known bugs into copies of the project, one at a time, and see that the tests notice each.

    python tests/mutants/run.py                    every *.patch of this folder
    python tests/mutants/run.py b03 top-p          those whose name contains one of the words
    python tests/mutants/run.py --jobs 4           so many at once

A patch says in its first line what the bug is and where it was met; its line `Tests:` names what is to be run first, then
come all tests of the file that it changes. A line is printed for each: `killed by` a test that is green without the bug,
`SURVIVED`, or `does not apply`. The exit status is 1 unless all were killed. mutation.md has the results. This needs git,
and Linux or macOS, where a process can fork: what all tests import is imported once.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEFT_OUT = shutil.ignore_patterns('.*', '__pycache__', 'data', 'out*', 'bench', 'mutants')
TESTS = {'model.py': ['model', 'huggingface'], 'train.py': ['train', 'robust'], 'sample.py': ['sample'],
         'prepare_data.py': ['prepare_data']}
HANGS, CAP = 150, 1500                             # seconds: of one test; of all tests of a mutant
MEMORY = 16 << 30                                  # bytes: a change may ask for all there is


def tests_of(files):
    """The test files of the files that a mutant changes, the most telling first."""
    found = [f'tests/test_{name}.py' for file in files for name in TESTS[file]]
    return [path for path in dict.fromkeys(found) if (ROOT / path).exists()]


def run_tests(folder, *args):
    """Run pytest there up to the first failure: (exit status, output). The status is None where its time was up."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, 'out')
        process = os.fork()
        if not process:  # the child becomes pytest
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            for stream in (1, 2):
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            status = pytest.main([
                '-x', '-q', '--tb=no', '-rfE', '-p', 'no:cacheprovider', '-o', f'faulthandler_timeout={HANGS}', '-o',
                'faulthandler_exit_on_timeout=true', '--basetemp', f'{temporary}/tests', *args])
            sys.stdout.flush()
            os._exit(status)
        done, began = 0, time.perf_counter()
        while not done and time.perf_counter() - began < CAP:
            time.sleep(0.05)
            done, status = os.waitpid(process, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)  # with all that a test has started
        if not done:
            os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status) if done else None, out.read_text('utf-8', 'replace')


class Judge:
    """Judges mutants in copies of the project below one temporary folder."""

    def __init__(self, folder):
        self.folder, self.clean, self.green = Path(folder), Path(folder, 'clean'), {}
        shutil.copytree(ROOT, self.clean, ignore=LEFT_OUT)
        status, out = run_tests(self.clean, 'tests/test_model.py', '--collect-only')
        if status:  # then every bug would look noticed
            sys.exit(f"the tests do not run here: pip install -r requirements.txt -r tests/requirements.txt\n{out}")

    def is_green(self, test):
        """Whether a test passes without any bug: one that always fails would kill everything."""
        if test not in self.green:
            self.green[test] = run_tests(self.clean, test, *([] if '::' in test else ['--collect-only']))[0] == 0
        return self.green[test]

    def verdict(self, name, change, stages):
        """change(folder) puts the bug in, or raises ValueError; stages: what to run, in that order. -> one line."""
        folder = self.folder / name
        shutil.copytree(self.clean, folder)
        try:
            change(folder)
            stages = list(stages)
            while stages:
                status, out = run_tests(folder, *stages[0])
                if status is None or re.search(r'^Timeout \(', out, re.M):
                    hung = re.search(r' in (test_\w+)', out)
                    return f"killed by time, in {hung[1]}" if hung else 'killed by time'
                failed = re.search(r'^(?:FAILED|ERROR) (\S+?::\w+(?:\[.*?\])?|\S+)(?= - |$)', out, re.M)
                if failed and '::' in failed[1] and not run_tests(folder, failed[1])[0]:
                    stages[0] = [*stages[0], '--deselect', failed[1]]  # once red, once green: it proves nothing
                    continue
                if failed and not self.is_green(failed[1]):
                    return f"SURVIVED: {failed[1]} fails without it too"
                if failed or status not in (0, 5):  # 5: no test of that name
                    return f"killed by {failed[1].split('::')[-1].partition('[')[0] if failed else f'exit {status}'}"
                stages.pop(0)
            return 'SURVIVED'
        except ValueError as e:
            return str(e)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def judge_all(mutants, jobs):
    """[(name, change, stages)] -> {name: verdict}, each printed as soon as it is there."""
    found, began = {}, time.perf_counter()
    os.environ.update({'OMP_NUM_THREADS': '1', 'COLUMNS': '300'})
    os.environ.setdefault('PLAINFORMER_SHARED', str(ROOT.parent / 'shared'))
    for name in ('torch', 'torch.nn.parallel', 'hypothesis', 'regex', 'tiktoken', 'safetensors', 'transformers'):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(folder)
        run_tests(judge.clean, '--collect-only', *{stages[0][0] for *_, stages in mutants})  # which compiles them

        global work  # the processes of the pool inherit it

        def work(i):
            return mutants[i][0], judge.verdict(*mutants[i])

        with multiprocessing.get_context('fork').Pool(jobs) as pool:
            for name, verdict in pool.imap_unordered(work, range(len(mutants))):
                print(f'{name}: {verdict}', flush=True)
                found[name] = verdict
    killed = sum(verdict.startswith('killed') for verdict in found.values())
    print(f'{killed} of {len(found)} killed in {(time.perf_counter() - began) / 60:.0f} minutes')
    return found


def read_patch(path):
    """A patch -> (name, what puts it in, what to run)."""
    text = path.read_text(encoding='utf-8')
    first = re.search(r'^Tests: (.*)', text, re.M)
    files = re.findall(r'^\+\+\+ b/(.*)', text, re.M)

    def change(folder):
        done = subprocess.run(['git', 'apply', '-C1', str(path)], cwd=folder, capture_output=True, encoding='utf-8')
        if done.returncode:
            raise ValueError(f'does not apply: {done.stderr.strip().splitlines()[0]}')

    return path.stem, change, [*([shlex.split(first[1])] if first else []), *([t] for t in tests_of(files))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', help='of the names of patches [all]')
    parser.add_argument('--jobs', type=int, default=2, help='mutants at once [2]')
    args = parser.parse_args()
    if not shutil.which('git') or not hasattr(os, 'fork'):
        sys.exit("this needs git, which puts the patches in, and a system whose processes can fork")
    patches = [path for path in sorted(HERE.glob('*.patch')) if not args.words or any(w in path.stem for w in args.words)]
    if not patches:
        sys.exit(f"no patch has one of these words in its name: {' '.join(args.words)}")
    found = judge_all([read_patch(path) for path in patches], args.jobs)
    sys.exit(not all(verdict.startswith('killed') for verdict in found.values()))


if __name__ == '__main__':
    main()
