"""
Tokens per second in writing, beside transformers' `generate` with the same weights: GPT-2's 124 M, drawn at random.

    python tests/bench/generate.py

`limit` is what memory allows: all weights are read once for every token. For a batch of 1 it is the machine's reading speed
(measured here) over the bytes of the weights.
"""

import argparse
import os
import tempfile
import time

import torch
import transformers
from common import alternate, table

import model
import sample

NEW = 128


def bandwidth():
    """Bytes a second that this machine reads."""
    x = torch.ones(2 ** 28, dtype=torch.uint8).view(torch.int64)
    x.sum()
    began = time.perf_counter()
    for _ in range(5):
        x.sum()
    return 5 * 2 ** 28 / (time.perf_counter() - began)


def ours(net, ids):
    def run():
        began = time.perf_counter()
        n = sum(1 for _ in sample.generate(net, ids, NEW, temperature=0))
        return n * len(ids) / (time.perf_counter() - began)

    run()
    return run


def theirs(net, ids):
    def run():
        began = time.perf_counter()
        with torch.inference_mode():
            net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                         pad_token_id=0)
        return NEW * len(ids) / (time.perf_counter() - began)

    run()
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--shapes', nargs='+', default=['1x16', '1x512', '16x16'], help='batch x tokens of the prompt')
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, speed = [], bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, 'gpt2')
        torch.manual_seed(0)
        model.export_huggingface(model.build(model.PRESETS['gpt2-124m']), folder)
        for batch, length in (map(int, shape.split('x')) for shape in args.shapes):
            ids = torch.randint(50257, (batch, length))
            for dtype in ('float32', 'bfloat16'):
                net = model.load(folder)[0].to(getattr(torch, dtype)).eval()
                there = transformers.GPT2LMHeadModel.from_pretrained(
                    folder, dtype=getattr(torch, dtype)).eval()
                found = alternate({'ours': ours(net, ids), 'transformers': theirs(there, ids)},
                                  args.rounds)
                size, other = 124e6 * (4 if dtype == 'float32' else 2), found['transformers']
                share = f"{found['ours'] * size / speed:.0%}" if batch == 1 else '-'
                rows.append([f'{batch} x {length}', dtype, found['ours'], other,
                             found['ours'] / other, share])
    table(['batch x prompt', 'dtype', 'tokens/s', 'transformers', 'times as fast', 'share of limit'], rows)


if __name__ == '__main__':
    main()
