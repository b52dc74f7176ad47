"""
Ask a trained model. A GPT goes on writing:

    python sample.py --start "The import statement"
    python sample.py --start FILE:poem.txt --num_samples 3 --temperature 0.9 --top_p 0.95 --seed 1
    printf "To be" | python sample.py --start - --stream

On standard output stands the text and nothing else; several samples are separated by a line of three dashes. A model
sees at most block_size tokens: when its window is full it forgets the older half and goes on. Writing ends after
--max_new_tokens, at a --stop text (which is not printed), or where the model ends the document.

    choose              logits -> the next token: greedy, temperature, top-k, top-p
    generate            ids -> new ids, one at a time, with a cache
    TextStream          ids -> text, never half a character
    text_loss           how well a model predicts a text: loss, perplexity, bits per byte

References:
    [1] Fan et al. 2018, Hierarchical Neural Story Generation (top-k), https://arxiv.org/abs/1805.04833
    [2] Holtzman et al. 2019, The Curious Case of Neural Text Degeneration (top-p), https://arxiv.org/abs/1904.09751
"""

import codecs
import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from model import load
from prepare_data import (
    check_flags,
    encode,
    find_files,
    flag,
    progress,
    read_documents,
    read_flags,
    run,
    tokenizer_from_dict,
)

# -----------------------------------------------------------------------------
# Choosing the next token


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    logits (B, V), uniform (B,) drawn from [0, 1) -> tokens (B,). A pure function: the same draw, the same token.

    temperature divides the logits: below 1 the likely gets likelier; 0 takes the best.
    top_k       only the k best may be chosen [1]: exactly k, also among equals. 0: all.
    top_p       only the fewest best whose probabilities reach p [2]: the one that crosses p is in. 1: all, 0: the best.
    """
    if temperature == 0 or top_k == 1 or top_p == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / temperature          # no overflow, however cold
    order = None
    if top_k:
        logits, order = logits.topk(min(top_k, logits.size(-1)))
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    p = logits.softmax(dim=-1)
    if top_p < 1:
        before = p.cumsum(dim=-1) - p  # what the better ones have together: nothing before the best
        p = p * (before < top_p)
    reached = p.cumsum(dim=-1)
    at = (reached > uniform[:, None].to(p) * reached[:, -1:]).int().argmax(dim=-1)     # the first that passes the draw
    return at if order is None else order.gather(1, at[:, None])[:, 0]


@torch.inference_mode()
def generate(model, ids, max_new_tokens, temperature=0.8, top_k=0, top_p=1.0, seed=0, first_row=0, forbidden=None,
             end_id=None):
    """
    Continue ids (B, T): yields the next tokens (B,), at most max_new_tokens times. Row i draws from a generator of its
    own, (seed, first_row + i), so a sample does not depend on its neighbours. forbidden (V,) marks tokens never chosen. A
    row that has chosen end_id goes on with end_id; when all have, it is over.

    The cache lets a step feed only the newest token. When the window is full, the newer half is read again from its
    first position, and the older half is forgotten.
    """
    draws = [np.random.default_rng((seed, first_row + i)) for i in range(len(ids))]
    block_size, done = model.config.block_size, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    window = new = ids[:, -block_size:]
    cache = {}
    for _ in range(max_new_tokens):
        if window.size(1) > block_size:
            window = new = window[:, -max(1, block_size // 2):]
            cache = {}
        logits = model.decode(new, cache=cache)                                        # (B, V)
        if forbidden is not None:
            logits = logits.masked_fill(forbidden, -math.inf)
        if ids.device.type == 'mps':  # it has no float64
            logits = logits.cpu()
        uniform = torch.tensor([draw.random() for draw in draws], dtype=torch.float64, device=logits.device)
        token = choose(logits, uniform, temperature, top_k, top_p).to(ids.device)      # (B,)
        if end_id is not None:
            token = token.masked_fill(done, end_id)
            done = done | (token == end_id)
        yield token
        if end_id is not None and done.all():
            return
        new = token[:, None]                                                           # (B, 1)
        window = torch.cat([window, new], dim=1)

# -----------------------------------------------------------------------------
# From ids to text


class TextStream:
    """
    Token by token to text. A character may be several tokens, so bytes wait here until it is whole; and text that could
    be the beginning of a stop text waits until it is clear whether it is one.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self.waiting, self.stopped = '', False

    def add(self, token):
        """The text that is certain now. After a stop text has come, `stopped` is True and nothing follows."""
        return self.release(self.decoder.decode(self.tokenizer.decode_single_token_bytes(token)))

    def end(self):
        """What still waited."""
        return self.release(self.decoder.decode(b'', final=True), last=True)

    def release(self, text, last=False):
        if self.stopped:
            return ''
        text = self.waiting + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if found:  # the one that is complete first, whatever the pieces in which the text came
            self.stopped, self.waiting = True, ''
            return text[:min(found)[1]]
        held = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                                  default=0)
        self.waiting = text[len(text) - held:]
        return text[:len(text) - held]


def forbidden_tokens(tokenizer, vocab_size):
    """(vocab_size,) bool: special tokens, and rows that no token has. They are never text; <|endoftext|> may be chosen."""
    forbidden = torch.zeros(vocab_size, dtype=torch.bool)
    forbidden[[i for text, i in tokenizer._special_tokens.items() if text != '<|endoftext|>' and i < vocab_size]] = True
    forbidden[tokenizer.n_vocab:] = True
    return forbidden


def write(model, tokenizer, prompt, settings, first_row=0, rows=1):
    """
    Continue the text `prompt` in `rows` samples: yields (row, text) as text becomes certain. An empty prompt
    starts a new document. Raises ValueError where the tokenizer cannot encode the prompt.
    """
    end_id = tokenizer._special_tokens['<|endoftext|>']
    device = next(model.parameters()).device
    ids = encode(tokenizer, prompt).astype(np.int64) if prompt else np.array([end_id])
    ids = torch.from_numpy(ids).to(device).expand(rows, -1)                            # (rows, T)
    streams = [TextStream(tokenizer, settings.stop) for _ in range(rows)]
    ended = [False] * rows
    for tokens in generate(model, ids, settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p,
                           settings.seed, first_row, forbidden_tokens(tokenizer, model.config.vocab_size).to(device),
                           end_id):
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token == end_id
            if not ended[row]:
                yield row, streams[row].add(token)
                ended[row] = streams[row].stopped
        if all(ended):
            break
    for row, stream in enumerate(streams):
        yield row, stream.end()

# -----------------------------------------------------------------------------
# Scores


@torch.no_grad()
def text_loss(model, tokens, block_size=0, rank=0, world=1, context=contextlib.nullcontext):
    """
    How well a model predicts a row of ids (n,), in windows of block_size that do not overlap: (nats, predictions). Every
    token but the first is predicted once; the loss is nats / predictions. With several ranks, each takes its share of
    the windows, and the sums are the caller's to add.
    """
    T = block_size or model.config.block_size
    rows = max(1, min(64, 2 ** 25 // (T * model.config.vocab_size)))  # what the logits of a batch may take in memory
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats, predictions = 0.0, 0
    starts = list(range(0, len(tokens) - 1, T))
    whole = [s for s in starts if s + T < len(tokens)]
    batches = [whole[i:i + rows] for i in range(0, len(whole), rows)] + [[s] for s in starts[len(whole):]]
    for batch in batches[rank::world]:
        window = np.stack([tokens[s:s + T + 1].astype(np.int64) for s in batch])       # (rows, T + 1)
        window = torch.from_numpy(window).to(device)
        with context():
            _, loss = model(window[:, :-1], targets=window[:, 1:], counts={'targets': 1})
        nats, predictions = nats + loss.item(), predictions + window[:, 1:].numel()
    model.train(was_training)
    return nats, predictions


def text_scores(nats, predictions, text_bytes):
    """Loss in nats a token, perplexity = exp(loss), and bits per byte, which compares across tokenizers."""
    loss = nats / predictions
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': nats / math.log(2) / max(1, text_bytes)}


def format_scores(scores):
    """loss 1.8980, perplexity 6.67, bits per byte 2.738"""
    return (f"loss {scores['loss']:.4f}, perplexity {scores['perplexity']:.2f}, "
            f"bits per byte {scores['bits_per_byte']:.3f}")


def score_file(model, tokenizer, path):
    """Score a text file as prepare_data.py reads it: documents end in <|endoftext|>."""
    ids, size, end_id = [], 0, tokenizer._special_tokens['<|endoftext|>']
    open_document = False
    for file in find_files([path]):
        for text, last in read_documents(file):
            ids.append(encode(tokenizer, text))
            size += len(text.encode())
            open_document = open_document or bool(text)
            if last and open_document:
                ids.append(np.array([end_id]))
                open_document = False
    ids = np.concatenate(ids) if ids else np.zeros(0)
    if len(ids) < 2:
        raise ValueError(f"--score {path}: no text in it")
    return text_scores(*text_loss(model, ids), size)

# -----------------------------------------------------------------------------
# The script

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass
class Settings:
    """The flags of this script."""
    start: str = flag('', 'what to continue: a text, FILE:path, or - for standard input; nothing: a new document')
    out_dir: str = flag('out', 'the folder that train.py wrote')
    init_from: str = flag('', 'a checkpoint or folder to use instead of out_dir')
    num_samples: int = flag(1, 'how many texts', low=1)
    max_new_tokens: int = flag(200, 'tokens in a text, at most', low=1)
    temperature: float = flag(0.8, '0 takes the likeliest token, 1 draws as the model says', low=0)
    top_k: int = flag(0, 'draw from the k likeliest tokens; 0: from all', low=0)
    top_p: float = flag(1.0, 'draw from the fewest likeliest tokens that reach this probability', low=0, high=1)
    stop: list = flag([], 'texts at which to stop')
    seed: int = flag(-1, 'the same seed writes the same text; -1: a new one every time', low=-1)
    stream: bool = flag(False, 'print text as it is written, one sample after the other')
    score: str = flag('', 'a file to score instead of writing: loss, perplexity, bits per byte')
    json: bool = flag(False, 'print JSON objects, one a line')
    device: str = flag('auto', 'where to compute', choices=('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of the weights; auto: bfloat16 to write on a GPU that has it, else float32',
                      choices=('auto', *DTYPES))

    def __post_init__(self):
        check_flags(self)


def find_device(name):
    """auto -> the best there is. Raises ValueError where the machine lacks what is asked for."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this torch has none: use --device auto")
    return name


def read_start(start):
    """The prompt that --start names. Raises ValueError or OSError."""
    if start == '-':
        data, name = sys.stdin.buffer.read(), 'standard input'
    elif start.startswith('FILE:'):
        name = start.removeprefix('FILE:')
        with open(name, 'rb') as f:
            data = f.read()
    else:
        return start
    try:
        text = data.decode('utf-8').removeprefix('\ufeff')
        return text.replace('\r\n', '\n').replace('\r', '\n')  # as prepare_data.py reads
    except UnicodeDecodeError as e:
        raise ValueError(f"{name} is not UTF-8: the byte at offset {e.start} cannot be read as text") from None


def print_texts(model, tokenizer, prompt, settings):
    """Write the samples to standard output, and how fast it went to standard error."""
    began, n_tokens = time.perf_counter(), 0
    n = settings.num_samples
    groups = [(row, 1) for row in range(n)] if settings.stream else [(0, n)]  # a stream shows one at a time
    for first, rows in groups:
        texts = [''] * rows
        if settings.stream and not settings.json:
            print(('---\n' if first else '') + prompt, end='', flush=True)
        for row, text in write(model, tokenizer, prompt, settings, first, rows):
            texts[row] += text
            n_tokens += 1
            if settings.stream and not settings.json:
                print(text, end='', flush=True)
            else:
                progress(f"{n_tokens} of {n * settings.max_new_tokens} tokens")
        n_tokens -= rows  # the last of each row is what still waited, not a token
        progress('')
        if settings.stream and not settings.json:
            print()
        for row, text in enumerate(texts):
            if settings.json:
                print(json.dumps({'prompt': prompt, 'text': text}, ensure_ascii=False))
            elif not settings.stream:
                print(('---\n' if row else '') + prompt + text)
    seconds = time.perf_counter() - began
    print(f"{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tok/s)", file=sys.stderr)


def main(argv):
    settings = Settings(**read_flags(argv, __doc__, {'flags': Settings}))
    device = find_device(settings.device)
    if settings.seed < 0:
        settings.seed = int.from_bytes(np.random.default_rng().bytes(4), 'little')
    prompt = '' if settings.score else read_start(settings.start)
    model, checkpoint = load(settings.init_from or settings.out_dir, device)
    if not checkpoint.get('tokenizer'):
        raise ValueError(f"{settings.init_from or settings.out_dir} has no tokenizer: it cannot read or write text")
    tokenizer = tokenizer_from_dict(checkpoint['tokenizer'])
    half = device == 'cuda' and not settings.score and torch.cuda.is_bf16_supported(including_emulation=False)
    model = model.to(DTYPES.get(settings.dtype, torch.bfloat16 if half else torch.float32)).eval()
    if settings.score:
        scores = score_file(model, tokenizer, settings.score)
        print(json.dumps(scores) if settings.json else format_scores(scores))
    else:
        print_texts(model, tokenizer, prompt, settings)


if __name__ == '__main__':
    run(main)
