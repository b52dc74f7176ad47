"""
Bugs that other projects had, as one-line changes to this one. Each is put into a copy, and the
tests that are named must turn red.

    python tests/known_bugs.py               all of them
    python tests/known_bugs.py -k padding    those whose name has this word

A row: name; who had it; file; the old text, which occurs exactly once; the new text; the tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, SAMPLE, TRAIN, DATA = 'model.py', 'sample.py', 'train.py', 'prepare_data.py'

BUGS = [
    # attention and masks
    ('the causal mask is off by one', 'many', MODEL,
     'mask = distance <= 0 if causal', 'mask = distance <= 1 if causal', 'test_model.py'),
    ('the mask means the opposite', 'nyu-mll/jiant#465', MODEL,
     "mask = mask & real[:, None, :] ", "mask = mask & ~real[:, None, :] ", 'test_model.py'),
    ('the padding mask is on the query axis', 'hyunwoongko/transformer#40', MODEL,
     "mask = mask & real[:, None, :] ", "mask = mask & real[:, :, None] ", 'test_model.py'),
    ('a query that sees nothing is NaN', 'pytorch#103749', MODEL,
     'mask = mask | ~mask.any(dim=-1, keepdim=True)', 'mask = mask | False', 'test_model.py'),
    ('cross-attention ignores the padding of the source', 'keras-io#1046', MODEL,
     "cross['mask'] = real |", "cross['mask'] = True | real |", 'test_model.py'),
    ('is_causal aligns query 0 with key 0 behind a cache', 'torch, many', MODEL,
     'if not 0 < window < S and (not self.causal or T == S):', 'if not 0 < window < S:',
     'test_model.py'),
    ('a window reaches one token too far', 'many', MODEL,
     'mask & (distance.abs() < window)', 'mask & (distance.abs() <= window)', 'test_model.py'),
    ('dropout of attention acts in evaluation', 'nanoGPT#240', MODEL,
     'p = drop.p if drop.training else 0.0', 'p = drop.p', 'test_model.py'),
    ('the formula has another scale than the kernel', 'nanoGPT#331', MODEL,
     'scale = scale or q.size(-1) ** -0.5', 'scale = scale or q.size(1) ** -0.5', 'test_model.py'),
    # positions and caches
    ('positions begin anew behind the cache', 'transformers#18104', MODEL,
     'positions = past + key_positions[:ids.size(1)]', 'positions = key_positions[:ids.size(1)]',
     'test_model.py'),
    ('the bound looks at the new tokens alone', 'nanochat#520', MODEL,
     'if end > self.config.block_size:', 'if ids.size(1) > self.config.block_size:',
     'test_model.py'),
    ('the cache is reordered without its values', 'many', MODEL,
     '{i: both[:, rows] for', '{i: torch.stack([both[0, rows], both[1]]) for',
     'test_model.py'),
    ('a cropped model keeps its positions', 'nanoGPT#220', MODEL,
     'torch.cat([rows, more])[:len(p)]', 'torch.cat([rows, more])[-len(p):]', 'test_model.py'),
    ('T5 takes a table of distances for each side of the decoder', 'transformers#10221', MODEL,
     'distance_buckets(distance, not self.causal,', 'distance_buckets(distance, True,',
     'test_model.py test_huggingface.py'),
    ('keys are not rotated', 'many', MODEL,
     'q, k = rotate(q, *rotary), rotate(k, *rotary)', 'q = rotate(q, *rotary)',
     'test_huggingface.py'),
    # blocks and weights
    ('post-norm normalises the branch', 'annotated-transformer#1', MODEL,
     'return norm(x + self.drop(sublayer(x)))', 'return x + norm(self.drop(sublayer(x)))',
     'test_model.py'),
    ('the exact GELU for weights of the tanh GELU', 'nanoGPT, model.py:83', MODEL,
     "'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # GPT-2",
     "'gelu_tanh': lambda x: F.gelu(x),  # GPT-2", 'test_model.py test_huggingface.py'),
    ('the tied weight is a copy', 'nanoGPT#21', MODEL,
     'self.weight = W if config.tied', 'self.weight = nn.Parameter(W.clone()) if config.tied',
     'test_model.py'),
    ('norms and biases decay', 'minGPT#16', MODEL,
     "'weight_decay': 0.0 if kind == 'vectors' else weight_decay}", "'weight_decay': weight_decay}",
     'test_model.py'),
    ('residual projections start as wide as all others', 'minGPT', MODEL,
     "std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == 'gpt2' and writes else 0.02",
     'std = 0.02', 'test_model.py'),
    # losses
    ('the number of targets of the global batch is ignored', 'transformers#34191', MODEL,
     'return loss / num_targets', 'return loss / (targets != IGNORE_INDEX).sum().clamp(min=1)',
     'test_model.py test_train.py'),
    ('a batch without targets is NaN', 'transformers#16711', MODEL,
     'num_targets = (targets != IGNORE_INDEX).sum().clamp(min=1)',
     'num_targets = (targets != IGNORE_INDEX).sum()', 'test_model.py'),
    ('label smoothing in evaluation', 'annotated-transformer#38', MODEL,
     'label_smoothing=smoothing)\n    if num_targets', 'label_smoothing=0.1)\n    if num_targets',
     'test_model.py'),
    ('a decoder is classified at its last position, padding or not', 'many', MODEL,
     'real.sum(dim=1) - 1]', '-1]', 'test_model.py'),
    ('an answer may lie in the padding', 'many', MODEL,
     'logits = logits.masked_fill(~attention_mask[:, None], lowest)', 'pass', 'test_model.py'),
    # files
    ('a checkpoint is written in place', 'nanoGPT, train.py', MODEL,
     "temporary = Path(f'{path}.{os.getpid()}.tmp')", 'temporary = Path(path)',
     'test_model.py test_robust.py'),
    ("Google's class 0, which means is-next, is taken for ours", 'bert#125', MODEL,
     "t.flip(0) if", "t if", 'test_huggingface.py'),
    # tokens and text
    ('a special token is written where a text names one', 'tiktoken', DATA,
     'disallowed_special=())', "allowed_special='all')", 'test_prepare_data.py'),
    ('an unknown character is a panic', 'tiktoken', DATA,
     "for c in dict.fromkeys(text):", "for c in '':",
     'test_prepare_data.py'),
    ('ids wrap around in uint16', 'knnlm#6', DATA, "'uint16' if", "'uint16' if True or",
     'test_prepare_data.py'),
    ('the end of a document is not written', 'trl#1623', DATA,
     'ids, is_open = np.append(ids, tokenizer.end_id), False', 'is_open = False',
     'test_prepare_data.py'),
    ('the end of a target has no target', 'llm-course#33', DATA,
     "'targets': ids}", "'targets': ids[:-1]}", 'test_prepare_data.py'),
    ('a cut loses the last [SEP]', 'BERT-pytorch', DATA,
     "ids += [*text, tokenizer.id('[SEP]')]", "ids += [*text, tokenizer.id('[CLS]')]",
     'test_prepare_data.py'),
    ('a text is decoded token by token', 'exo#1691', SAMPLE,
     ".rstrip('\\ufffd')", '', 'test_sample.py'),
    # objectives
    ('targets are shifted twice', 'transformers#47394', TRAIN,
     "return {'ids': window[:-1], 'targets': window[1:]}",
     "return {'ids': window[:-2], 'targets': window[2:]}", 'test_train.py'),
    ('the last window is never taken', 'OpenVerifiableLLM#92', TRAIN,
     'if last < T:', 'if last <= T:', 'test_train.py'),
    ('hiding a token overwrites its target', 'transformers!244', TRAIN,
     'return shown, targets', 'targets[chosen] = shown[chosen]\n    return shown, targets',
     'test_train.py'),
    ('padding and special tokens are hidden', 'transformers#11155', TRAIN,
     'places = np.flatnonzero(data.is_text[ids]) ', 'places = np.arange(len(ids)) ',
     'test_train.py'),
    ('the random token may be a special one', 'transformers#15342', TRAIN,
     'rng.choice(np.flatnonzero(data.is_text), len(replaced))',
     'rng.choice(data.vocab_size, len(replaced))', 'test_train.py'),
    ('a row without a hidden token', 'transformers#16711', TRAIN,
     '[:max(1, round(0.15 * len(places)))]', '[:round(0.15 * len(places))]', 'test_train.py'),
    ('the wrong B is of the same document', 'DeepLearningExamples#421', TRAIN,
     'second += (high - low) * (second >= low)', 'second += 0', 'test_train.py'),
    ('the class of next sentences is turned around', 'bert#125', TRAIN,
     '.tolist(), int(follows)', '.tolist(), int(not follows)', 'test_train.py'),
    # training
    ('a mean of means under accumulation', 'nanochat!400', TRAIN,
     '_, loss = forward(**batch, **numbers)', '_, loss = forward(**batch)', 'test_train.py'),
    ('clipped before unscaling', 'lightning#9599', TRAIN,
     'runtime.scaler.unscale_(optimizer)', 'pass', 'test_train.py'),
    ('a step that is not finite moves the weights', 'many', TRAIN,
     'good = (loss + norm).isfinite().float()', 'good = torch.ones_like(loss)',
     'test_train.py'),
    ('evaluation without eval()', 'BERT-pytorch', SAMPLE,
     '    model.eval()\n    try:', '    try:', 'test_sample.py test_train.py'),
    ('the mode is not restored after evaluation', 'texar#311', SAMPLE,
     'model.train(was_training)', 'pass', 'test_sample.py test_train.py'),
    ('the optimizer begins anew on resume', 'torchtitan#1213', TRAIN,
     'optimizer.load_state_dict(saved)', 'pass', 'test_train.py test_robust.py'),
    ('dropout is not drawn from the step', 'transformers#11323', TRAIN,
     'torch.manual_seed(int(seed))', 'int(seed)', 'test_train.py test_robust.py'),
    ('one step too many', 'nanoGPT, train.py', TRAIN,
     'if reason or at.step >= s.max_iters:', 'if reason or at.step > s.max_iters:',
     'test_train.py'),
    ('an epoch sees its rows in one order', 'accelerate#4071', TRAIN,
     'epoch_order(n, self.seed, epoch)[k]', 'epoch_order(n, self.seed, 0)[k]', 'test_train.py'),
    # decoding
    ('top-k keeps more than k among equals', 'nanoGPT, model.py', SAMPLE,
     'logits, order = logits.topk(min(top_k or V, V))',
     'logits, order = logits.topk(min(top_k + 1 if top_k else V, V))', 'test_sample.py'),
    ('top-p drops the token that crosses p', 'reasoning-from-scratch#164', SAMPLE,
     'p = p * (p.cumsum(dim=-1) - p < top_p)', 'p = p * (p.cumsum(dim=-1) < top_p)',
     'test_sample.py'),
    ('a padded vocabulary is sampled', 'nanoGPT', SAMPLE,
     'i not in ends and (i >= tokenizer.n_vocab or i in hidden)', 'i not in ends and i in hidden',
     'test_sample.py'),
    ('rows share their draws', 'many', SAMPLE,
     'np.random.default_rng((seed, row))', 'np.random.default_rng((seed, 0))', 'test_sample.py'),
    ('a longer text is punished, not favoured', 'transformers#16930', SAMPLE,
     'length ** length_penalty', 'length ** -length_penalty', 'test_sample.py'), ]

def put_in(folder, file, old, new):
    """Change a file of a copy. Raises ValueError unless the old text occurs exactly once."""
    text = (folder / file).read_text(encoding='utf-8')
    if text.count(old) != 1:
        raise ValueError(f'this text occurs {text.count(old)} times in {file}: {old}')
    (folder / file).write_text(text.replace(old, new), encoding='utf-8')

def run(bug):
    """(bug, the seconds that the tests took to turn red; None where they did not)."""
    _, _, file, old, new, tests = bug
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in ROOT.glob('*.py'):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / 'tests', folder / 'tests')
        put_in(folder, file, old, new)
        started = time.perf_counter()
        paths = [str(folder / 'tests' / name) for name in tests.split()]
        command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *paths]
        shared = os.environ.get('PLAINFORMER_SHARED', str(ROOT.parent / 'shared'))
        done = subprocess.run(command, cwd=folder, capture_output=True, env={
            **os.environ, 'PLAINFORMER_SHARED': shared, 'OMP_NUM_THREADS': '1'})
    return bug, time.perf_counter() - started if done.returncode == 1 else None

def main():
    word = sys.argv[2] if sys.argv[1:2] == ['-k'] else ''
    lost = [name for name, _, file, old, *_ in BUGS
            if (ROOT / file).read_text(encoding='utf-8').count(old) != 1]
    if lost:
        sys.exit(f'the old text of these rows does not occur once: {lost}')
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each runs its tests in a process
        for bug, seconds in pool.map(run, [bug for bug in BUGS if word in bug[0]]):
            print(f"{'SURVIVES' if seconds is None else f'red after {seconds:3.0f} s'}   "
                  f'{bug[0]} ({bug[1]})', flush=True)
            survivors += [bug[0]] if seconds is None else []
    if survivors:
        sys.exit(f'{len(survivors)} bugs survive')

if __name__ == '__main__':
    main()
