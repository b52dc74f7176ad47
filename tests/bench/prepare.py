"""
From text to numbers: learning a byte-level BPE beside the trainer of Hugging Face's `tokenizers`, encoding beside plain
tiktoken, and how much memory a whole command needs at its peak as the text grows.

    python tests/bench/prepare.py --input shakespeare.txt poems.txt

Larger texts are the given ones, repeated.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import time

import regex
import tokenizers
from common import ROOT, alternate, table

import prepare_data


def timed(function):
    def run():
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return run


def learn_ours(text, vocab_size):
    prepare_data.bpe_tokenizer([text], vocab_size)


def learn_theirs(text, vocab_size):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(prepare_data.PATTERNS['bpe']), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - len(prepare_data.SPECIALS), show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)


def peak(path, folder):
    """(seconds, peak resident megabytes) of `python prepare_data.py --input path`."""
    code = ("import resource, subprocess, sys, time; began = time.perf_counter(); "
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)")
    script, out = os.path.join(ROOT, 'prepare_data.py'), os.path.join(folder, 'data')
    done = subprocess.run([sys.executable, '-c', code, sys.executable, script, '--input', path, '--out_dir', out], text=True,
                          capture_output=True, check=True)
    return map(float, done.stdout.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', nargs='+', required=True, help='text files')
    parser.add_argument('--sizes', nargs='+', type=int, default=[50, 500], help='megabytes of the larger texts')
    args = parser.parse_args()
    texts = []
    for path in args.input:
        with open(path, encoding='utf-8') as f:
            texts.append(f.read())
    small = texts[0]
    rows = []
    for name, text in (('first text', small), (f'{args.sizes[0]} MB', (small * 100)[:args.sizes[0] * 1_000_000])):
        found = alternate({'ours': timed(lambda t=text: learn_ours(t, 4096)),
                           'theirs': timed(lambda t=text: learn_theirs(t, 4096))}, 3 if text is small else 1)
        rows.append([f'learn 4,096 tokens from {name}', found['ours'], found['theirs'], found['theirs'] / found['ours']])
    tokenizer = prepare_data.bpe_tokenizer([small], 4096)
    plain = tokenizer.encoding
    with tempfile.TemporaryDirectory() as folder:
        lines = collections.deque(regex.findall(r'(?s).{1,1000000}', small * 20))
        found = alternate({
            'ours': timed(lambda: tokenizer.encode_batch(list(lines))),
            'theirs': timed(lambda: plain.encode_ordinary_batch(list(lines), num_threads=os.cpu_count()))}, 3)
        rows.append([f'encode {20 * len(small) / 1e6:.0f} MB (beside tiktoken)', found['ours'], found['theirs'],
                     found['theirs'] / found['ours']])
        table(['', 'seconds', 'the other', 'times as fast'], rows)
        rows = []
        for size in args.sizes:
            path = os.path.join(folder, f'{size}.txt')
            with open(path, 'w', encoding='utf-8') as f:
                written = 0
                while written < size * 1_000_000:
                    written += f.write(texts[written // 1000 % len(texts)])
            seconds, megabytes = peak(path, folder)
            rows.append([f'prepare_data.py, {size} MB', seconds, os.path.getsize(path) / 1e6 / seconds, megabytes])
            os.remove(path)
        table(['', 'seconds', 'MB/s', 'peak MB'], rows)


if __name__ == '__main__':
    main()
