"""
Tokens per second in writing, beside transformers' `generate` with the same weights: GPT-2's 124 M, drawn at random.
On a GPU transformers is asked with a static cache, too, which it compiles.

    python tests/bench/generate.py
    python tests/bench/generate.py --shapes 1x16 16x16 128x16     a GPU, where there is one
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

NEW = 512 if torch.cuda.is_available() else 128

def ours(net, ids):
    def run():
        began = time.perf_counter()
        n = sum(1 for _ in sample.generate(net, ids, NEW, temperature=0))
        return n * len(ids) / (time.perf_counter() - began)
    run()
    return run

def theirs(net, ids, **how):
    def run():
        began = time.perf_counter()
        with torch.inference_mode():
            net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                         pad_token_id=0, **how).tolist()
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
    device, rows = sample.find_device('auto'), []
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py does
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.join(folder, 'gpt2')
        torch.manual_seed(0)
        model.export_huggingface(model.build(model.PRESETS['gpt2-124m']), folder)
        for batch, length in (map(int, shape.split('x')) for shape in args.shapes):
            ids = torch.randint(50257, (batch, length), device=device)
            for dtype in (torch.float32, torch.bfloat16):
                net = sample.arrange_weights(model.load(folder)[0].to(device, dtype).eval())
                there = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()
                runs = {'ours': ours(net, ids), 'transformers': theirs(there, ids)}
                if device == 'cuda':
                    runs['static'] = theirs(there, ids, cache_implementation='static')
                found = alternate(runs, args.rounds)
                rows.append([f'{batch} x {length}', str(dtype)[6:], *found.values(), found['ours'] / found['transformers']])
    table(['batch x prompt', 'dtype', 'tokens/s', *[*runs][1:], 'times as fast'], rows)

if __name__ == '__main__':
    main()
