"""What the benchmarks share: whole commands, medians, and a small table."""

import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

def command(script, *flags, cwd):
    """Run a script of the project as a user would: (seconds of the whole process, what it printed)."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, check=False)
    if done.returncode == 2:  # what the user can mend: the line that says how
        sys.exit(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, flags))} failed:\n{done.stderr}")
    return time.perf_counter() - began, done.stdout

def alternate(functions, rounds):
    """{name: function} -> {name: median of what it returns}, each called once a round, so that noise hits all alike."""
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(function())
    return {name: statistics.median(values) for name, values in found.items()}

def table(header, rows):
    """Print rows of cells in columns."""
    rows = [[cell if isinstance(cell, str) else f'{cell:,.4g}' for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print('  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))), flush=True)
