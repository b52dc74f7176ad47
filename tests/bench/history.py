"""
Before the LSTM, and after it: counting, a running state, attention then and now, on one text, in the same time.

    python tests/bench/history.py                            on Python's documentation, about 5 minutes
    python tests/bench/history.py --input shakespeare.txt    on another text

The n-gram models are interpolated Kneser-Ney [1] over the ids that the others read; they only count, so their seconds are
what that takes. Each of the other models is first measured for a few steps, and then trained with its own recipe for as many
as fit into --seconds, so that its learning rate ends there. The loss is that of the whole validation split; bits per byte
also compare across tokenizers. What favours the n-grams a little: the others know nothing of what stood before a window.

    [1] Chen and Goodman 1999, An Empirical Study of Smoothing Techniques for Language Modeling (section 2.7, one discount)
"""

import argparse
import math
import os
import re
import tempfile
import time
from collections import Counter

import numpy as np
from common import command, table

import prepare_data
import sample
import train

PRESETS = ('lstm', 'gpt2', 'nano')

class KneserNey:
    """
    P(w | h) = (max(c(h w) - d, 0) + d N(h) P(w | h without its first token)) / c(h)

    c(h w) is how often w came after h, c(h) the sum of it over all w, and N(h) how many different w there were: a discount
    d is taken from each, and the next shorter context deals it out. There c(h w) is how many different tokens stood before h
    w, not how often: "Francisco" is frequent, but follows one word only. Below one token all of the vocabulary is alike, so
    nothing has probability 0.
    """

    def __init__(self, ids, order, vocab_size):
        self.vocab_size, self.levels = vocab_size, []                                  # of the shortest context first
        counts = Counter(zip(*(ids[i:] for i in range(order))))
        for _ in range(order):
            total, kinds = Counter(), Counter(gram[:-1] for gram in counts)
            for gram, n in counts.items():
                total[gram[:-1]] += n
            once, twice = (sum(n == k for n in counts.values()) for k in (1, 2))
            discount = (once + 1) / (once + 1 + 2 * (twice + 1))                       # 1 more, since none gives no discount
            self.levels.insert(0, (counts, total, kinds, discount))
            counts = Counter(gram[1:] for gram in counts)                              # in how many ways it can be continued

    def probability(self, context, token):
        """Of a token after a tuple of ids."""
        p = 1 / self.vocab_size
        for n, (counts, total, kinds, discount) in enumerate(self.levels):
            h = context[len(context) - n:]
            if len(h) < n or h not in total:  # what was never seen has no longer context that was
                break
            p = (max(counts[*h, token] - discount, 0) + discount * kinds[h] * p) / total[h]
        return p

    def nats(self, ids):
        """Of all tokens but the first."""
        k = len(self.levels) - 1
        return -sum(math.log(self.probability(tuple(ids[max(0, i - k):i]), ids[i])) for i in range(1, len(ids)))

    def check(self, ids):
        """Raise ValueError where a distribution does not sum to 1: after contexts of ids, and one that was never seen."""
        k = len(self.levels) - 1
        places = np.random.default_rng(0).integers(k, len(ids), 10)
        for context in [*(tuple(ids[i - k:i]) for i in places), (-1,) * k]:
            total = sum(self.probability(context, token) for token in range(self.vocab_size))
            if abs(total - 1) > 1e-6:
                raise ValueError(f'the probabilities after {context} sum to {total}')

def count_ngrams(order, data, val):
    """A row of the table."""
    began = time.perf_counter()
    model = KneserNey(data.tokens.tolist(), order, data.vocab_size)
    seconds, ids = time.perf_counter() - began, val.tokens.tolist()
    model.check(ids)
    scores = sample.text_scores(model.nats(ids), len(ids) - 1, val.counts)
    size = sum(len(counts) for counts, *_ in model.levels)
    return [f'{order}-gram', f'{size:,} counts', '', seconds, *shown(scores.values())]

def shown(scores):
    """Loss, perplexity and bits per byte as cells."""
    return [f'{float(value):.{digits}f}' for value, digits in zip(scores, (4, 2, 3))]

def train_for(seconds, preset, flags, trial, folder):
    """A row of the table: a few steps to see how fast they are, then as many as fit."""
    def run(steps, out_dir):
        _, said = command('train.py', '--dataset', 'text', '--preset', preset, '--max_iters', steps, '--eval_interval',
                          steps, '--eval_iters', 1, '--sample_tokens', 0, '--log_interval', trial, '--out_dir', out_dir,
                          *flags, cwd=folder)
        return said, np.genfromtxt(os.path.join(folder, out_dir, 'log.csv'), delimiter=',', names=True)[-1]
    said, last = run(2 * trial + 1, f'trial-{preset}')  # the last line of its log speaks of the second `trial` steps
    speed = float(re.findall(r'([\d,]+) tok/s', said)[-1].replace(',', ''))
    steps = max(1, round(seconds * speed / (last['tokens'] / last['step'])))
    said, last = run(steps, f'out-{preset}')
    _, scores = command('train.py', '--eval_only', '--out_dir', f'out-{preset}', cwd=folder)
    return [preset, re.search(r'[\d,]+ parameters', said)[0].replace('parameters', 'weights'), f'{steps:,}', last['seconds'],
            *shown(re.findall(r'\d+\.\d+', scores))]

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', default='pydoc', help='a text file, or pydoc: what Python says of itself')
    parser.add_argument('--tokenizer', default='bpe', help='as in prepare_data.py')
    parser.add_argument('--vocab_size', type=int, default=4096, help='of bpe')
    parser.add_argument('--order', nargs='+', type=int, default=[2, 4], help='of n-grams: tokens, context included')
    parser.add_argument('--seconds', type=float, default=60, help='of training for each of ' + ', '.join(PRESETS))
    parser.add_argument('--quick', action='store_true', help='see in half a minute that all of it works')
    args = parser.parse_args(argv)
    flags, trial = [], 20
    if args.quick:
        args.seconds, flags, trial = 1, '--n_layer 1 --n_embd 32 --block_size 32'.split(), 3
    with tempfile.TemporaryDirectory() as folder:
        source = ['--dataset', 'pydoc'] if args.input == 'pydoc' else ['--input', os.path.abspath(args.input)]
        command('prepare_data.py', *source, '--tokenizer', args.tokenizer, '--vocab_size', args.vocab_size, '--out_dir',
                'data/text', cwd=folder)
        data, val = (train.Data(os.path.join(folder, 'data', 'text'), split) for split in ('train', 'val'))
        rows = []
        for order in args.order:
            prepare_data.progress(f'counting {order}-grams')
            rows.append(count_ngrams(order, data, val))
        for preset in PRESETS:
            prepare_data.progress(f'training {preset}')
            rows.append(train_for(args.seconds, preset, flags, trial, folder))
    prepare_data.progress('')
    table(['model', 'size', 'steps', 'seconds', 'loss', 'perplexity', 'bits per byte'], rows)

if __name__ == '__main__':
    prepare_data.run(main)
