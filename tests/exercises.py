"""
One solution for each exercise of the README: what changes where. Each is put into a copy, which
then trains a small model; its loss must fall.

    python tests/exercises.py               all of them
    python tests/exercises.py -k Lion       those whose name has this word

A row: the flags to train with, and (file, old text, new text), where the old text occurs once.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from known_bugs import ROOT, put_in

FLAGS = '''train.py --dataset text --n_layer 2 --n_head 2 --n_embd 32 --mlp_dim 64 --block_size 32
    --batch_size 8 --max_iters 40 --eval_interval 40 --eval_iters 2 --sample_tokens 0'''

SOLUTIONS = {
    'ALiBi': ('--preset gpt2 --positions alibi', [
        ('model.py', "'rotary', 'relative', 'none'", "'rotary', 'relative', 'alibi', 'none'"),
        ('model.py', "self.config.positions == 'relative'\n        # Kernels",
         "self.config.positions in ('relative', 'alibi')\n        # Kernels"),
        ('model.py', '            bias = self.relative_bias(buckets).permute(2, 0, 1)', '''
            if self.config.positions == 'alibi':
                H = self.config.n_head
                slopes = 2 ** (-8 * torch.arange(1, H + 1, device=distance.device) / H)
                bias = -slopes[:, None, None] * distance.abs()
            else:
                bias = self.relative_bias(buckets).permute(2, 0, 1)'''),
    ]),
    'an attention sink': ('--preset gpt2', [
        ('model.py', 'def attention_weights(q, k, mask=None, causal=False, scale=None):',
         'def attention_weights(q, k, mask=None, causal=False, scale=None, sink=None):'),
        ('model.py', '    return scores.softmax(dim=-1)\n', '''
    if sink is not None:  # (H,): the score of a key without a value
        column = sink[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1)
'''),
        ('model.py', '        self.drop, self.layer = Dropout(config.dropout), layer\n', '''
        self.drop, self.layer = Dropout(config.dropout), layer
        self.sink = nn.Parameter(torch.zeros(H))
'''),
        ('model.py', '        if self.recorded is not None:\n',
         "        scoring['sink'] = self.sink\n        if self.recorded is not None:\n"),
    ]),
    'a prefix LM': ('--preset gpt2 --objective prefix_lm', [
        ('train.py', "def masked_lm(", '''def prefix_lm(data, index, T):
    """The first tokens of a window see each other; what follows them is predicted."""
    window, prefix = data.window(index, T), T // 4
    targets = window[1:].copy()  # ids has the same memory
    targets[:prefix - 1] = IGNORE_INDEX
    return {'ids': window[:-1], 'targets': targets, 'prefix': prefix}

def masked_lm('''),
        ('train.py', "    'masked_lm': Objective(",
         "    'prefix_lm': Objective(prefix_lm, ('gpt',), by_rows=False),\n"
         "    'masked_lm': Objective("),
        ('model.py', 'causal, window=0, real=None):', 'causal, window=0, real=None, prefix=None):'),
        ('model.py', '    if window:\n        mask =', '''
    if prefix is not None:  # (B,)
        mask = mask | (key_positions < prefix[:, None, None])
    if window:
        mask ='''),
    ]),
    'several labels': ('--dataset rows --preset gpt2', [
        ('model.py', "        if task == 'qa':\n            logits =", '''
        if task == 'topics':  # no or yes, for each label
            logits = torch.stack([-logits, logits], dim=-1)                # (B, L, 2)
        if task == 'qa':
            logits ='''),
        ('prepare_data.py', "TASKS = {\n", '''
def topics_examples(tokenizer, row, labels, block_size):
    [example] = classify_examples(tokenizer, pick(row, 'text'), labels, block_size)
    if 'label' in row:
        found = sorted(row['label'].split(','))
        example['targets'] = [int(label in found) for label in labels]
        example['meta']['label'] = ','.join(found)
    return [example]

TASKS = {
    'topics': Task(lambda path: read_columns(path, 'label', 'text'), topics_examples,
                   lambda row: row['label'].split(',')),
'''),
        ('sample.py', "LOWER_IS_BETTER =", '''
def decode_topics(examples, logits, labels):
    pairs = zip(labels, logits[0].tolist())
    return {'label': ','.join(label for label, (no, yes) in pairs if yes > no)}

DECODERS['topics'], SCORES['topics'] = decode_topics, label_scores
BEST_SCORES['topics'] = ['accuracy']
LOWER_IS_BETTER ='''),
    ]),
    'another reading': ('--dataset rows --preset gpt2', [
        ('model.py',
         '            x = x[torch.arange(len(x), device=x.device), real.sum(dim=1) - 1]', '''
            real = real[..., None]
            x = (x * real).sum(dim=1) / real.sum(dim=1)'''),
    ]),
    'Lion': ('--preset gpt2 --optimizer lion --learning_rate 3e-4', [
        ('train.py', 'def orthogonal(x):', '''class Lion(Optimizer):
    """Every weight moves by the sign of a mean of gradients."""

    def new_state(self, p):
        return [torch.zeros_like(p)]

    def update(self, lr, decay, good, weights, gradients, means):
        for p, g, mean in zip(weights, gradients, means):
            g = g.where(good > 0, mean)  # it may hold NaN
            p -= good * lr * (mean.lerp(g, 0.1).sign() + decay * p)
            mean.lerp_(g, 0.01)

def orthogonal(x):'''),
        ('train.py', "OPTIMIZERS = {'adamw': adamw,",
         "OPTIMIZERS = {'lion': lambda groups, s, dtype: [Lion(groups, s.learning_rate)],\n"
         "              'adamw': adamw,"),
    ]),
    'z-loss': ('--preset gpt2', [
        ('model.py', '    if num_targets is None:\n', '''
    log_z = logits.flatten(0, -2).float().logsumexp(dim=-1)
    little = 1e-4 if torch.is_grad_enabled() else 0.0
    loss = loss + little * log_z[targets.flatten() != IGNORE_INDEX].square().sum()
    if num_targets is None:
'''),
    ]),
}

def command(folder, flags):
    words = [sys.executable, *flags.split()]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{flags}: {done.stderr[-300:]}')
    return done.stdout

def main():
    word = sys.argv[2] if sys.argv[1:2] == ['-k'] else ''
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in ROOT.glob('*.py'):
            shutil.copy(path, folder)
        (folder / 'text.txt').write_text('the cat sat on the mat. it purred.\n' * 200)
        (folder / 'rows.tsv').write_text('yes\tgood\nno\tbad\nno,yes\tgood, bad\n' * 50)
        command(folder, 'prepare_data.py --input text.txt --tokenizer char')
        for name in [name for name in SOLUTIONS if word in name]:
            flags, changes = SOLUTIONS[name]
            for change in changes:
                put_in(folder, *change)
            task = 'topics' if name == 'several labels' else 'classify'
            command(folder, f'prepare_data.py --input rows.tsv --task {task} --tokenizer byte')
            said = command(folder, f'{FLAGS} {flags}')
            first, *_, last = map(float, re.findall(r'val .*?loss ([\d.]+)', said))
            print(f'{name}: {len(changes)} places, loss {first:.2f} -> {last:.2f}', flush=True)
            if not last < first:
                sys.exit(f'{name} learns nothing')
            for file, _, _ in changes:
                shutil.copy(ROOT / file, folder)

if __name__ == '__main__':
    main()
