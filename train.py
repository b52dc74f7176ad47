"""
Train any model of model.py with one loop.

    python train.py                                           a small GPT on Python's documentation, about a minute
    python train.py --dataset shakespeare --preset nano       another text, another row of the table
    python train.py --init_from resume                        go on, bit for bit as if never stopped
    python train.py --preset bert --out_dir out-bert          another way to learn from the same text
    python train.py --init_from out-bert --dataset pytopics   fine-tune it on labelled data
    torchrun --nproc_per_node=4 train.py --gradient_accumulation_steps 4

The data flow, and all that the loop knows of a task:

    ids --objective--> examples --collate--> batch --model(**batch)--> (logits, loss)

An example is a dict whose keys are the arguments of model.forward(). A step is a pure function of the checkpoint and its
number: which windows it reads, and what dropout drops, is drawn from (seed, step), so nothing about the loader needs
saving, and a resumed run is the unbroken one.

    Settings, RECIPES                   the flags, and good values for them
    causal_lm, masked_lm, supervised    what is shown and what is asked: the objectives
    Text, Examples, get_batch           which part of the data a step sees
    learning_rate                       and the optimizers
    Machine, Signals                    where it runs, and what ends it early
    evaluate, train                     the loop
    rehearse, dry_run                   what a run costs, before it is spent
    start, main                         new, resumed, or from another checkpoint

References:
    [1] Loshchilov and Hutter 2017, Decoupled Weight Decay Regularization (AdamW), https://arxiv.org/abs/1711.05101
    [2] Micikevicius et al. 2017, Mixed Precision Training, https://arxiv.org/abs/1710.03740
    [3] Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon
    [4] Devlin et al. 2018, BERT, https://arxiv.org/abs/1810.04805
    [5] Miyato et al. 2017, Adversarial Training Methods for Text Classification, https://arxiv.org/abs/1605.07725
    [6] Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples, https://arxiv.org/abs/1412.6572
    [7] Raffel et al. 2019, T5, https://arxiv.org/abs/1910.10683
    [8] Hoffmann et al. 2022, Training Compute-Optimal Large Language Models (Chinchilla), https://arxiv.org/abs/2203.15556
"""

import contextlib
import csv
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import prepare_data
import sample
from model import (
    IGNORE,
    PRESETS,
    Config,
    Stack,
    TaskModel,
    build,
    cross_entropy,
    optimizer_groups,
    read_checkpoint,
    resized,
    save,
    shapes_of,
    write_file,
)
from prepare_data import check_flags, flag, progress, read_flags, read_json, run, tokenizer_to_dict

# -----------------------------------------------------------------------------
# Settings. The architecture is elsewhere (Config in model.py): it outlives the training.


@dataclass
class Settings:
    """The flags of training. Raises ValueError where one is out of its range."""
    # what to train
    dataset: str = flag('pydoc', 'name of a folder in data/, or a folder that prepare_data.py made')
    preset: str = flag('gpt2', 'row of the table in model.py', choices=tuple(PRESETS))
    init_from: str = flag('scratch', 'scratch | resume (out_dir/ckpt.pt) | auto (resume where there is one) | a checkpoint')
    out_dir: str = flag('out', 'folder for ckpt.pt, best.pt, log.csv and config.toml')
    config: str = flag('', 'TOML file of flags, such as the config.toml of another run; a flag given here counts more')
    eval_only: bool = flag(False, 'print the loss over the whole validation split, and write nothing')
    dry_run: bool = flag(False, 'print what the run would cost in memory and time, and write nothing')
    device_memory: float = flag(0.0, 'of --dry_run: GB of the device; 0: that of this machine', low=0)
    device_speed: float = flag(0.0, 'of --dry_run: TFLOP/s of training there; 0: half of a measured product', low=0)
    objective: str = flag('', 'what is asked [of text, what the preset was made for; of labelled data, its labels]',
                          choices=('', 'causal_lm', 'masked_lm', 'span_corruption', 'supervised', 'completion'))
    best_by: str = flag('', 'what makes a checkpoint the best [the loss, or the score of a task]; of text to text',
                        choices=('', 'loss', 'bleu', 'rouge1', 'rouge2', 'rougeL', 'exact_match'))
    # how much
    batch_size: int = flag(16, 'examples in a micro-batch', low=1)
    gradient_accumulation_steps: int = flag(1, 'micro-batches in a step, over all processes together', low=1)
    max_iters: int = flag(800, 'steps', low=0)
    eval_interval: int = flag(100, 'steps between evaluations; each writes ckpt.pt', low=1)
    eval_iters: int = flag(20, 'batches in an evaluation', low=1)
    log_interval: int = flag(20, 'steps between lines of the log', low=1)
    sample_tokens: int = flag(60, 'tokens of the sample that an evaluation prints; 0: none', low=0)
    patience: int = flag(0, 'stop after so many evaluations without a better one; 0: never', low=0)
    target_loss: float = flag(0.0, 'stop once the loss over the whole validation split is at most this; 0: never', low=0)
    # how
    optimizer: str = flag('adamw', 'muon: Muon for matrices, AdamW for the rest', choices=('adamw', 'muon'))
    learning_rate: float = flag(2e-3, 'of AdamW, at its highest', above=0)
    muon_learning_rate: float = flag(0.02, 'of Muon, at its highest', above=0)
    min_lr: float = flag(None, 'learning rate at the end [learning_rate / 10]', low=0, kind=float)
    warmup_iters: int = flag(50, 'steps over which the learning rate rises', low=0)
    lr_decay_iters: int = flag(None, 'step at which it has fallen to min_lr [max_iters]', low=1, kind=int)
    lr_schedule: str = flag('cosine', 'how it falls', choices=('cosine', 'linear', 'constant'))
    weight_decay: float = flag(0.1, 'of matrices and embeddings', low=0)
    beta1: float = flag(0.9, 'AdamW: memory of the gradient', low=0, below=1)
    beta2: float = flag(0.99, 'AdamW: memory of its square', low=0, below=1)
    grad_clip: float = flag(1.0, 'longest gradient, as a norm over all weights; 0: any', low=0)
    freeze: str = flag('none', 'what keeps its weights: none | embeddings | trunk | a number: embeddings and so many blocks')
    adversarial: float = flag(0.0, 'also learn with the embedding moved so far where it hurts the most; 0: off', low=0)
    # where
    seed: int = flag(1337, 'of everything random', low=0)
    device: str = flag('auto', 'where to compute', choices=('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of products: bfloat16 where the device is good at it; weights stay float32',
                      choices=('auto', 'float32', 'bfloat16', 'float16'))
    compile: bool = flag(None, 'torch.compile [on a GPU]', kind=bool)
    backend: str = flag('auto', 'of torchrun: nccl on GPUs, gloo on CPUs', choices=('auto', 'nccl', 'gloo'))

    def __post_init__(self):
        check_flags(self)
        if self.freeze not in ('none', 'embeddings', 'trunk') and not self.freeze.isdecimal():
            raise ValueError(f"--freeze {self.freeze}: choose none, embeddings, trunk, or a number of blocks")
        if self.adversarial and self.freeze != 'none':
            raise ValueError(f"--adversarial {self.adversarial} moves the embedding, which --freeze {self.freeze} holds "
                             "still: leave one of them out")


# Good values where they differ from the defaults: first by what is trained, then by preset ('': any).
MUON = dict(optimizer='muon', min_lr=0.0, warmup_iters=100, lr_schedule='linear')
PAIRS = dict(MUON, max_iters=2000, learning_rate=3e-3, muon_learning_rate=0.01, eval_interval=250)
SMALL = dict(MUON, max_iters=1000, batch_size=32, learning_rate=2e-3, muon_learning_rate=3e-3)
LARGE = dict(optimizer='adamw', max_iters=800, batch_size=32, learning_rate=1e-4, min_lr=0.0, lr_schedule='linear',
             beta2=0.999, weight_decay=0.01, dropout=0.1)
TAGS = dict(LARGE, max_iters=600, learning_rate=2e-4)
WRITING = dict(LARGE, learning_rate=3e-4)
MORE_TEXT = dict(LARGE, max_iters=400, batch_size=8, gradient_accumulation_steps=1, learning_rate=3e-5, warmup_iters=50,
                 eval_interval=100, eval_iters=20)
PRETRAINED = ('gpt2-124m', 'bert-base', 't5-small', 'llama-7b')  # as what weights of others count
RECIPES = {
    'pretrain': {
        'lstm': dict(learning_rate=1e-2),
        'palm': dict(learning_rate=1e-2),  # its embeddings start large, and move as slowly as all else under AdamW
        't5': dict(PAIRS, batch_size=32),
        'gpt2-124m': dict(learning_rate=6e-4, warmup_iters=2000, max_iters=600_000, beta2=0.95, batch_size=12,
                          gradient_accumulation_steps=40, eval_interval=2000, eval_iters=200),
        'nano': dict(max_iters=200, batch_size=24, optimizer='muon', learning_rate=1.5e-2, muon_learning_rate=0.03,
                     min_lr=0.0, warmup_iters=0, lr_schedule='linear', weight_decay=0.0, beta1=0.8, beta2=0.95,
                     grad_clip=0.0),
        # one token in seven is asked for, so it needs many; Muon, and a learning rate that post-norm survives
        'bert': dict(MUON, max_iters=2500, batch_size=64, learning_rate=6e-3, muon_learning_rate=0.01, eval_interval=500,
                     log_interval=100),
    },
    # heads on small trunks; large pre-trained ones want small steps, few of them, and AdamW: [4], appendix A.3
    'classify': {'': dict(SMALL, dropout=0.3), **dict.fromkeys(PRETRAINED, LARGE)},
    'tag': {'': dict(SMALL, max_iters=1500, dropout=0.1), **dict.fromkeys(PRETRAINED, TAGS)},
    'qa': {'': dict(SMALL, dropout=0.1), **dict.fromkeys(PRETRAINED, LARGE)},
    'seq2seq': {'': dict(PAIRS, batch_size=64), **dict.fromkeys(PRETRAINED, WRITING)},
    'more text': dict.fromkeys(PRETRAINED, MORE_TEXT),
}


def recipe(task, preset, goes_on=False):
    """
    What RECIPES has for a task ('lm': pre-training) and a preset: settings, and maybe a dropout. goes_on: from weights that
    have learned from other text already.
    """
    rows = RECIPES['pretrain' if task == 'lm' else task]
    return {**rows.get('', {}), **rows.get(preset, {}), **(RECIPES['more text'].get(preset, {}) if goes_on else {})}

# -----------------------------------------------------------------------------
# Objectives: what is shown, and what is asked? Each is a function of (data, rows, block_size) to a list of examples.
# rows: consecutive running numbers of the examples, counted from the first step.


def causal_lm(data, rows, block_size):
    """
    At every position: which token comes next?

        text      T h e   c a t
        ids       T h e   c a
        targets   h e   c a t         already shifted here: the model shifts nothing
    """
    examples = []
    for i in data.window_starts(rows, block_size):
        window = data.tokens[i:i + block_size + 1].astype(np.int64)                    # (T + 1,)
        examples.append({'ids': window[:-1], 'targets': window[1:]})
    return examples


IS_NEXT = 1                                        # the class of next_targets that says: B follows A


def sentence_pairs(data, u, room):
    """
    Draw two runs of sentences for each row of u (B, 3), numbers in [0, 1). Returns (tokens of A, tokens of B, B follows A)
    for each. A starts at any sentence that has a successor and takes a quarter to three quarters of the room; B starts at
    the next sentence, or in another document. What is too long loses the beginning of A and the end of B, so that the two
    still touch.
    """
    starts, document, followed = data.sentences                                        # (S + 1,), (S,), (F,)
    first = followed[(u[:, 0] * len(followed)).astype(int)]                            # A's first sentence, (B,)
    low, high = (np.searchsorted(document, document[first], side) for side in ('left', 'right'))  # its document
    length = room // 4 + (u[:, 1] * (room // 2 + 1)).astype(int)
    after = np.searchsorted(starts, starts[first] + length, side='right') - 1          # as many sentences as fit
    after = np.clip(after, first + 1, high - 1)
    follows = u[:, 2] < 0.5
    any_other = ((u[:, 2] * 2 - 1) * (len(document) - (high - low))).astype(int)       # 0, 1, ... outside of A's document
    second = np.where(follows, after, any_other + (high - low) * (any_other >= low))
    end = starts[np.searchsorted(document, document[second], side='right')]            # of B's document
    end, end_id = np.minimum(end, starts[second] + room), data.tokenizer._special_tokens['<|endoftext|>']
    pairs = []
    for f, a, n, b, e, follow in zip(first, after, length, second, end, follows):
        text = data.tokens[starts[b]:e]
        stop = np.flatnonzero(text == end_id)  # white space may follow it: the next document begins with some
        before = data.tokens[max(starts[f], starts[a] - n):starts[a]]
        pairs.append((before.tolist(), (text[:stop[0]] if len(stop) else text).tolist(), follow))
    return pairs


def masked_lm(data, rows, block_size):
    """
    Which tokens are hidden, and does the second text follow the first? Section 3.1 of [4].

        text        the cat sat . it purred .              half of the pairs follow; else B is from another document:
                                                           the same one would be too easy to believe, and often true
        ids         [CLS] the [M] sat .  [SEP] it  dog   .   [SEP]
        segments      0    0   0   0  0    0    1   1    1     1
        targets       .    .  cat  .  .    .    .  purred .    .           a dot is IGNORE
        next_targets  IS_NEXT

    Of the text tokens 15 % are asked for, at least one a row, never a special token or padding. Of those 80 % show [MASK];
    10 % another token and 10 % themselves, since no [MASK] will stand in the texts of a task: what is seen must be used, and
    cannot be trusted. The other token is never a special one. Rows of labelled data are taken as they are, without
    next_targets; so is text without sentences that follow each other.
    """
    u, special = data.uniforms(rows, 2 * block_size + 3), data.tokenizer._special_tokens
    pairs = ()
    if isinstance(data, Examples):
        framed = [(example['ids'], example.get('segments', [0] * len(example['ids'])))
                  for example in supervised(data, rows, block_size)]
    elif data.has_pairs:
        pairs = sentence_pairs(data, u[:, -3:], block_size - 3)
        framed = [prepare_data.frame(data.tokenizer, a, b[:block_size - 3 - len(a)]) for a, b, _ in pairs]
    else:
        room = block_size - 2
        framed = [prepare_data.frame(data.tokenizer, data.tokens[i:i + room].tolist())
                  for i in data.window_starts(rows, room)]
    ids = np.full((len(framed), block_size), special['[PAD]'])                         # (B, T)
    for row, (tokens, _) in zip(ids, framed):
        row[:len(tokens)] = tokens

    data.check(ids)
    text = data.is_text[ids]                                                           # (B, T)
    n = np.maximum(1, np.rint(0.15 * text.sum(axis=1))).astype(int)                    # (B,)
    order = np.where(text, u[:, :block_size], 2).argsort(axis=1)                       # text tokens first, in any order
    asked = np.zeros_like(text)
    np.put_along_axis(asked, order, np.arange(block_size) < n[:, None], axis=1)
    asked &= text                                                                      # a row may have no text at all
    shown, draw = ids.copy(), u[:, block_size:-3]                                      # ids are the targets: keep them
    shown[asked & (draw < 0.8)] = special['[MASK]']
    other = asked & (draw >= 0.8) & (draw < 0.9)
    shown[other] = data.text_ids[((draw[other] - 0.8) * 10 * len(data.text_ids)).astype(int)]
    targets = np.where(asked, ids, IGNORE)

    examples = [{'ids': shown[i, :len(segments)], 'segments': segments, 'targets': targets[i, :len(segments)]}
                for i, (_, segments) in enumerate(framed)]
    for example, (_, _, follow) in zip(examples, pairs):
        example['next_targets'] = IS_NEXT if follow else 1 - IS_NEXT
    return examples


def supervised(data, rows, block_size):
    """What prepare_data.py has written, every example once an epoch."""
    return data.examples_of(rows)


def completion(data, rows, block_size):
    """
    Text to text on a decoder alone: the source is a prompt, and only the target is asked for. Instruction tuning at its
    simplest.

        ids       twenty one [SEP] 2 1
        targets   .      .   2     1 <|endoftext|>        a dot is IGNORE
    """
    examples, sep = supervised(data, rows, block_size), data.tokenizer._special_tokens['[SEP]']
    return [{'ids': [*e['ids'][:-1], sep, *e['targets'][:-1]], 'targets': [IGNORE] * (len(e['ids']) - 1) + e['targets']}
            for e in examples]


def span_corruption(data, rows, block_size):
    """
    Text to text from plain text: section 3.1.4 of [7]. Runs of tokens are hidden, 15 % of all and three long on average; a
    sentinel stands for each, and the target says what stood there.

        text           Thank you for inviting me to your party last week
        ids            Thank you <extra_0> me to your party <extra_1> week <|endoftext|>
        decoder_ids    <|endoftext|> <extra_0> for inviting <extra_1> last
        targets        <extra_0> for inviting <extra_1> last <|endoftext|>
    """
    special = data.tokenizer._special_tokens
    hidden = max(2, round(0.15 * block_size))                                          # tokens, and in how many runs
    spans = min(100, max(1, round(hidden / 3)))
    u, examples = data.uniforms(rows, block_size), []

    def cut(total, u):
        """Cut `total` tokens into `spans` runs of at least one, all ways being equally likely: (B, spans)."""
        at = np.sort(u[:, :total - 1].argsort(axis=1)[:, :spans - 1] + 1, axis=1)
        return np.diff(at, axis=1, prepend=0, append=total)

    shown = cut(block_size - hidden, u[:, hidden:])
    for start, before, gone in zip(data.window_starts(rows, block_size), shown, cut(hidden, u[:, :hidden])):
        source, target, at = [], [], start
        for i, (a, b) in enumerate(zip(before.tolist(), gone.tolist())):
            sentinel = special[f'<extra_{i}>']
            source += [*data.tokens[at:at + a].tolist(), sentinel]
            target += [sentinel, *data.tokens[at + a:at + a + b].tolist()]
            at += a + b
        end_id = special['<|endoftext|>']
        start_id = special.get('<|start|>', end_id)
        examples.append({'ids': [*source, end_id], 'decoder_ids': [start_id, *target], 'targets': [*target, end_id]})
    return examples


OBJECTIVES = {'causal_lm': causal_lm, 'masked_lm': masked_lm, 'span_corruption': span_corruption, 'supervised': supervised,
              'completion': completion}
LABELLED = ('supervised', 'completion')            # those that read labelled data as such
METRICS = {'classify': 'accuracy', 'tag': 'f1', 'qa': 'f1'}  # what makes a checkpoint the best; else the loss

# -----------------------------------------------------------------------------
# Data


SPLITS = {'train': 0, 'val': 1}


class Data:
    """
    One split of a folder that prepare_data.py made; Text and Examples are its kinds. Raises ValueError or OSError where it
    is not one.
    """

    def __init__(self, folder, split, seed=0):
        self.folder, self.split, self.seed, self.epoch = folder, split, seed, None
        self.batch_size = 1  # so many consecutive examples should be of about one length: `train` says how many
        self.meta = read_json(os.path.join(folder, 'meta.json'))
        try:
            self.counts, self.vocab_size = self.meta['counts'][split], self.meta['vocab_size']
            self.task, self.labels = self.meta['task'], self.meta['labels']
            if not (type(self.vocab_size) is int and 0 < self.vocab_size < 2 ** 31
                    and self.task in ('lm', *prepare_data.TASKS)
                    and type(self.labels) is list and all(type(label) is str for label in self.labels)
                    and all(type(n) is int for n in [self.counts['bytes'], *self.counts.values()])):
                raise TypeError("a field is of another kind")
            self.read()
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{folder}/meta.json is not that of a data set ({e!r}): prepare the data again") from None

    @property
    def fingerprint(self):
        """What tells this data from other data: a run that goes on must go on with the same."""
        return {key: self.meta.get(key) for key in ('sha256', 'val_sha256', 'counts', 'vocab_size', 'labels')}

    @functools.cached_property
    def tokenizer(self):
        tokenizer = prepare_data.load_tokenizer(self.folder)
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in tokenizer._special_tokens.values()):
            raise ValueError(f"{self.folder}: tokenizer.json is not that of meta.json: prepare the data again")
        return tokenizer

    @functools.cached_property
    def is_text(self):
        """Which ids are text, not special tokens: (V,) bool."""
        is_text = np.ones(self.vocab_size, bool)
        is_text[list(self.tokenizer._special_tokens.values())] = False
        return is_text

    @functools.cached_property
    def text_ids(self):
        return np.flatnonzero(self.is_text)

    @functools.cached_property
    def commonest(self):
        """The text token that occurs most often (in the first ten million)."""
        often = np.bincount(self.tokens[:10_000_000], minlength=self.vocab_size)[:self.vocab_size]
        return int((often * self.is_text).argmax())

    def uniforms(self, rows, n):
        """
        n numbers in [0, 1) for each of consecutive `rows`: (B, n). A counter makes them, so they can be had from any row on,
        and a row has the same ones however the rows are shared among processes.
        """
        blocks = -(-n // 4)  # a count gives four numbers
        counter = np.random.Philox(np.random.SeedSequence((self.seed, SPLITS[self.split]))).advance(rows[0] * blocks)
        return np.random.Generator(counter).random((len(rows), 4 * blocks))[:, :n]

    def check(self, ids):
        """Raise ValueError where an id is beyond the vocabulary: on a GPU it would end everything without a word."""
        if (highest := int(ids.max())) >= self.vocab_size:
            raise ValueError(f"{self.folder} holds the id {highest} in {self.split}, but its vocabulary has only "
                             f"{self.vocab_size}: prepare the data again")

    def window_starts(self, rows, block_size):
        """
        Where each of `rows` begins. An epoch takes all of n windows once, in an order drawn from (seed, split, epoch), and
        begins at another offset than the epoch before, so that a token meets every position.
        """
        last = len(self.tokens) - 1  # a window has block_size + 1 tokens: the last one is only ever a target
        if last < block_size:
            raise ValueError(f"{self.folder}/{self.split}.bin has {last + 1} tokens, fewer than block_size + 1 = "
                             f"{block_size + 1}: lower --block_size, or prepare more text")
        n = max(1, last // block_size - 1)
        starts = []
        for row in rows:
            epoch, k = divmod(int(row), n)
            if self.epoch != (epoch, block_size):
                rng = np.random.default_rng((self.seed, SPLITS[self.split], epoch))
                self.offset = rng.integers(last - n * block_size + 1)  # rng.integers and permutation exclude the end
                self.order, self.epoch = rng.permutation(n), (epoch, block_size)
            starts.append(int(self.offset + self.order[k] * block_size))
        return starts


class Text(Data):
    """One long row of ids, to pre-train on."""

    def read(self):
        path, dtype, n = os.path.join(self.folder, f'{self.split}.bin'), self.meta['dtype'], self.counts['tokens']
        if dtype not in ('uint16', 'uint32') or os.path.getsize(path) != n * np.dtype(dtype).itemsize or n < 2:
            raise ValueError(f"{path} is not the {n} ids that meta.json speaks of: prepare the data again")
        self.tokens = np.memmap(path, dtype, mode='r')

    @functools.cached_property
    def sentences(self):
        """Where sentences start, and the last one ends (S + 1,); their documents (S,); those with a successor (F,)."""
        path = os.path.join(self.folder, f'{self.split}.sentences.npy')
        try:
            table = np.load(path)
            starts, document = np.ascontiguousarray(table.T)
            rising = (np.diff(starts) >= 0).all() and (np.diff(document) >= 0).all()
            if table.dtype.kind != 'i' or not rising or (len(table) and not 0 <= starts[0] <= starts[-1] < len(self.tokens)):
                raise ValueError
        except (ValueError, TypeError, EOFError):
            raise ValueError(f"{path} is damaged: prepare the data again") from None
        return np.append(starts, len(self.tokens)), document, np.flatnonzero(document[1:] == document[:-1])

    @functools.cached_property
    def has_pairs(self):
        """Two documents at least, since a wrong B must come from another one, and sentences that follow each other."""
        _, document, followed = self.sentences
        return bool(len(followed)) and document[0] != document[-1]

    def check_length(self, block_size, whole=False):
        self.window_starts([0], block_size)  # raises where it is too short


def check_example(example, task, labels, vocab_size):
    """
    (len(ids), len(decoder_ids)) of an example of labelled data. Raises ValueError, KeyError, TypeError, ... where it is not
    one: ids and targets within their bounds, parts that belong to each other, and all that scoring will ask for.
    """
    ids, targets, segments, decoder_ids = (np.array(example.get(key, []), int) for key in (
        'ids', 'targets', 'segments', 'decoder_ids'))
    parts, about = np.concatenate([ids, decoder_ids]), example['about']
    if not ids.size or not 0 <= parts.min() <= parts.max() < vocab_size:
        raise ValueError(f"ids must be below {vocab_size}")
    classes = {'seq2seq': vocab_size, 'qa': len(ids)}.get(task, len(labels))
    if not ((targets == IGNORE) | (targets >= 0) & (targets < classes)).all():
        raise ValueError(f"targets must be below {classes}")
    texts = lambda *values: all(type(value) is str for value in values)
    if task == 'classify':
        fits = targets.shape == () and about['label'] in labels
    elif task == 'tag':
        fits = (targets.shape == ids.shape and len(about['tokens']) == len(about['where']) == len(about['tags'])
                and texts(*about['tokens']) and set(about['tags']) <= set(labels)
                and all(0 <= t < len(ids) for t in about['where']))
    elif task == 'qa':
        fits = (targets.shape == (2,) and texts(about['context'], *about['answers']) and type(about['start']) is int
                and 0 < about['first'] <= len(ids) - 1 - len(about['offsets'])
                and np.array(about['offsets'], int).reshape(-1, 2).shape == (len(about['offsets']), 2))
    else:
        fits = 0 < decoder_ids.size == targets.size and targets.ndim == 1 and texts(about['source'], about['target'])
    if not (fits and ids.ndim == 1 and type(about['row']) is int and segments.shape in ((0,), ids.shape)
            and set(segments.tolist()) <= {0, 1}):
        raise ValueError("its parts do not fit together")
    return len(ids), len(decoder_ids)


class Examples(Data):
    """Labelled examples, a line of JSON each, to fine-tune on. Only their places and lengths are kept in memory."""

    has_pairs = False  # no row follows another

    def read(self):
        self.path, n = os.path.join(self.folder, f'{self.split}.jsonl'), self.counts['examples']
        places, lengths, at = [], [], 0
        with open(self.path, 'rb') as f:
            for line in f:
                try:
                    sizes = check_example(json.loads(line), self.task, self.labels, self.vocab_size)
                except (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as e:
                    raise ValueError(f"{self.path}, line {len(places) + 1}: not an example of {self.task} ({e!r}): prepare "
                                     "the data again") from None
                places.append(at)
                lengths.append(sizes)
                at += len(line)
        if len(places) != n or not n:
            raise ValueError(f"{self.path} has {len(places)} examples, not the {n} that meta.json speaks of: prepare the "
                             "data again")
        self.places, self.lengths = np.array(places), np.array(lengths)                # lengths (n, 2): ids, decoder_ids

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        with open(self.path, 'rb') as f:
            f.seek(self.places[i])
            return json.loads(f.readline())

    def examples_of(self, rows):
        """
        The example of each of `rows`. An epoch takes each once, in an order drawn from (seed, split, epoch): the examples of
        a batch are of about one length, so little of it is padding, and the batches come in any order.
        """
        n, size, examples = len(self), self.batch_size, []
        for row in rows:
            epoch, k = divmod(int(row), n)
            if self.epoch != ('examples', epoch, size):
                rng = np.random.default_rng((self.seed, SPLITS[self.split], epoch))
                begin = min(n, -epoch * n % size)      # the epoch before left a batch unfinished
                first, whole, last = np.split(rng.permutation(n), [begin, begin + (n - begin) // size * size])
                blur = self.lengths[whole].max(axis=1) * rng.uniform(1, 1.1, len(whole))  # or every epoch has the same ones
                whole = rng.permutation(whole[blur.argsort()].reshape(-1, size))
                self.order, self.epoch = np.concatenate([first, whole.flatten(), last]), ('examples', epoch, size)
            examples.append(self[self.order[k]])
        return examples

    def check_length(self, block_size, whole=False):
        """Raise ValueError where an example is longer than block_size; whole: where source and target together are."""
        longest = (self.lengths.sum(axis=1) if whole else self.lengths).max()
        if longest > block_size:
            raise ValueError(f"{self.path} has an example of {longest} tokens, more than block_size={block_size}: prepare "
                             f"the data with --block_size {block_size}, or train a model (or its trunk) with --block_size "
                             f"{longest}")

    @functools.cached_property
    def tokens(self):
        """All texts in one row of ids, for objectives that read text."""
        return np.concatenate([self[i]['ids'] for i in range(len(self))])


def open_data(folder, split, seed=0):
    """The Text or Examples of a folder that prepare_data.py made. Raises ValueError or OSError where it is not one."""
    meta = read_json(os.path.join(folder, 'meta.json'))
    return (Text if not isinstance(meta, dict) or meta.get('task') == 'lm' else Examples)(folder, split, seed)


def get_batch(data, objective, block_size, first, n, pad_id=0, device='cpu'):
    """The examples first, first + 1, ..., first + n - 1 since the beginning of training, as a batch."""
    batch = sample.collate(OBJECTIVES[objective](data, range(first, first + n), block_size), pad_id)
    for key in ('ids',) if objective in LABELLED else ('ids', 'targets'):
        data.check(batch[key])
    pinned = device.startswith('cuda')  # from pinned memory the copy overlaps with work; MPS has none
    return {key: (t.pin_memory() if pinned else t).to(device, non_blocking=pinned) for key, t in batch.items()}

# -----------------------------------------------------------------------------
# Optimization


def learning_rate(step, s):
    """Up in a straight line for warmup_iters, then down to min_lr at lr_decay_iters (not with `constant`), then level."""
    low = s.learning_rate / 10 if s.min_lr is None else s.min_lr
    end = s.lr_decay_iters or s.max_iters
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if s.lr_schedule == 'constant':
        return s.learning_rate
    done = min(1.0, (step - s.warmup_iters) / max(1, end - s.warmup_iters))
    return low + (s.learning_rate - low) * (0.5 * (1 + math.cos(math.pi * done)) if s.lr_schedule == 'cosine' else 1 - done)


class Optimizer:
    """
    Groups of weights with their settings, and what is remembered of each weight: `state` {weight: tensors}. Those of
    torch.optim would do the same; but to make one takes a second, for the compiler that they bring.
    """

    def __init__(self, groups, **settings):
        self.param_groups, self.state = [{**settings, **group} for group in groups], {}

    @torch.no_grad()
    def step(self):
        """Move the weights that have a gradient."""
        for group in self.param_groups:
            weights = [p for p in group['params'] if p.grad is not None]
            for p in weights:
                if p not in self.state:
                    self.state[p] = self.start(p)
            if weights:
                self.move(group, weights, [p.grad for p in weights], [self.state[p] for p in weights])

    def zero_grad(self):
        for group in self.param_groups:
            for p in group['params']:
                p.grad = None

    def state_dict(self):
        weights = [p for group in self.param_groups for p in group['params']]
        return {'state': {i: self.state[p] for i, p in enumerate(weights) if p in self.state}, 'param_groups': [
            {key: value for key, value in group.items() if key != 'params'} for group in self.param_groups]}

    def load_state_dict(self, saved):
        """What is remembered comes back; settings stay, since flags given on resume count."""
        weights = [p for group in self.param_groups for p in group['params']]
        for i, tensors in saved['state'].items():
            self.state[weights[i]] = fresh = self.start(weights[i])
            for new, old in zip(fresh, tensors, strict=True):
                if new.shape != old.shape:  # AdamW works on bare memory
                    raise ValueError(f"{tuple(old.shape)} instead of {tuple(new.shape)}")
                new.copy_(old)


class AdamW(Optimizer):
    """
    [1]: m and v are running means of the gradient g and of its square; divided by 1 - beta^t, since both begin at 0, they
    are m' and v'. In step t a weight moves by -lr (m' / (sqrt(v') + 1e-8) + weight_decay * weight).
    """

    def start(self, p):
        return [torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)]  # m, v, t

    def move(self, group, weights, gradients, state):
        m, v, t = zip(*state)
        torch._foreach_add_(t, 1)
        torch._fused_adamw_(weights, gradients, m, v, [], t, lr=group['lr'], beta1=group['betas'][0],
                            beta2=group['betas'][1], weight_decay=group['weight_decay'], eps=1e-8, amsgrad=False,
                            maximize=False)  # all of it in one pass over memory


def orthogonal(x, bfloat16):
    """
    x (n, rows, columns) -> nearly orthogonal matrices: U Vᵀ of U S Vᵀ, but for singular values between 0.7 and 1.2. Five
    steps of an odd polynomial of degree 5 (Newton-Schulz) bring all of them there, from wherever they were in (0, 1] [3].
    """
    wide = x.size(1) <= x.size(2)
    x = (x if wide else x.mT).to(torch.bfloat16 if bfloat16 else x.dtype)              # rough products will do
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                                # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


class Muon(Optimizer):
    """
    Momentum, then a step of equal size in all directions [3]: plain gradients would follow the few largest. Matrices of one
    shape are worked on together.
    """

    def start(self, p):
        return [torch.zeros_like(p)]

    def move(self, group, weights, gradients, state):
        shapes = {}
        for i, p in enumerate(weights):
            shapes.setdefault(p.shape, []).append(i)
        for (rows, columns), same in shapes.items():
            p, g, m = ([of[i] for i in same] for of in (weights, gradients, [m for m, in state]))
            torch._foreach_lerp_(m, g, 1 - group['momentum'])
            step = orthogonal(torch.stack(torch._foreach_lerp(g, m, group['momentum'])), group['bfloat16']).to(p[0].dtype)
            torch._foreach_mul_(p, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(p, list(step.unbind()), alpha=-group['lr'] * math.sqrt(max(1, rows / columns)))


def make_optimizers(model, s, dtype):
    """AdamW for all, or Muon for the matrices and AdamW for what is left. dtype: in which the machine multiplies fast."""
    groups = optimizer_groups(model, s.weight_decay)
    matrices = [g for g in groups if g['name'] == 'matrices' and s.optimizer == 'muon']
    rest = [g for g in groups if g not in matrices]
    muon = [Muon(matrices, lr=s.muon_learning_rate, momentum=0.95, bfloat16=dtype == torch.bfloat16)] if matrices else []
    return muon + ([AdamW(rest, lr=s.learning_rate, betas=(s.beta1, s.beta2))] if rest else [])

# -----------------------------------------------------------------------------
# The machine: precision, compilation, processes


def keep_memory():
    """
    glibc gives large blocks back to the system as soon as they are free, and every step is handed its activations anew, one
    zeroed page after the other. Told to keep them, it trains the GPT of the quick start 1.8 times as fast.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)            # M_MMAP_MAX: take blocks from the heap, however large
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: and never shrink it


class Machine:
    """Where the training runs, and how: device, precision, and which of several processes this is."""

    def __init__(self, s):
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        self.device = sample.find_device(s.device)
        if self.world > 1:
            if self.device == 'cuda':
                self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group(s.backend if s.backend != 'auto' else
                                        'nccl' if self.device.startswith('cuda') else 'gloo')
        self.main = self.rank == 0
        self.dtype = getattr(torch, s.dtype if s.dtype != 'auto' else self.best_dtype())
        if self.device == 'cpu':
            keep_memory()
        if s.dtype != 'float32' and self.device.startswith('cuda'):
            torch.set_float32_matmul_precision('high')  # TF32 for the products that autocast leaves in float32
        self.scaler = torch.amp.GradScaler(self.device.split(':')[0], enabled=self.dtype == torch.float16)

    def best_dtype(self):
        """bfloat16 where the hardware multiplies in it; float16, with its scaler, on older GPUs; else float32."""
        if self.device.startswith('cuda'):
            return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        if self.device == 'cpu' and torch.backends.mkldnn.is_available():
            # Measured with AVX512-BF16: a step takes 0.5 of the time of float32 at 4 x 128, 0.3 at 6 x 384.
            names = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
            return 'bfloat16' if any(getattr(torch.cpu, name, bool)() for name in names) else 'float32'
        return 'float32'

    def precision(self):
        """Inside it, products are computed in self.dtype; the residual stream, its norms and the loss in float32 [2]."""
        return torch.autocast(self.device.split(':')[0], self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *values):
        """Add numbers over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def say(self, text):
        if self.main:
            progress('')
            print(text, flush=True)


class Interrupted(Exception):
    """A signal has come, while there was work that may be left."""


class Signals:
    """Ctrl-C and SIGTERM. `caught` is the number of the first that came, 0 before; a second one ends the process at once."""
    caught, impatient = 0, False

    def listen(self):
        self.caught = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.caught:
            os._exit(128 + number)
        self.caught = number
        print("\nsaving at the end of this step; once more to end at once", file=sys.stderr, flush=True)
        if self.impatient:
            raise Interrupted

    def hurry(self, work, otherwise):
        """
        work(), or `otherwise`, as soon as a signal comes. For work of one process alone: where others wait for an answer,
        it has to be given, whatever it is worth. `train` makes nothing of it, once all have agreed that a signal came.
        """
        try:
            self.impatient = True
            return otherwise if self.caught else work()
        except Interrupted:
            return otherwise
        finally:
            self.impatient = False


signals = Signals()  # of this process


def compiled(model, batch, machine, wanted):
    """torch.compile(model) where it is wanted and works, else the model itself and one warning."""
    if not (machine.device.startswith('cuda') if wanted is None else wanted):
        return model
    try:
        fast = torch.compile(model)
        with machine.precision():
            fast(**batch, counts={'targets': 1})[1].backward()  # compilation happens here: the first call
        model.zero_grad(set_to_none=True)
        return fast
    except Exception as e:  # a missing C compiler, an unsupported GPU, ...
        model.zero_grad(set_to_none=True)
        reason = str(e).strip().splitlines() or ['']
        warnings.warn(f"torch.compile failed, going on without it ({type(e).__name__}: {reason[0][:200]})", stacklevel=1)
        return model

# -----------------------------------------------------------------------------
# The loop


def count_tokens(s, data, config):
    """Tokens of a step; of labelled data, which are of many lengths, the mean."""
    return round(s.batch_size * s.gradient_accumulation_steps * (
        data.lengths.sum(axis=1).mean() if isinstance(data, Examples) else config.block_size))


def count_targets(batches, machine):
    """{'targets': how many are asked in the batches of all processes together, ...}"""
    names = [key for key in batches[0] if key.endswith('targets')]
    totals = machine.sum(*(sum(int((batch[name] != IGNORE).sum()) for batch in batches) for name in names))
    return {name: max(1, int(total)) for name, total in zip(names, totals)}


def estimate(forward, model, data, s, machine, pad_id):
    """Scores of the same eval_iters batches every time, shared among the processes; of labelled validation data, of all."""
    if s.objective == 'masked_lm':
        return masked_scores(model, data, s.eval_iters * s.batch_size, s, machine)
    if s.objective == 'supervised' and data.split == 'val' and data.task != 'seq2seq':
        return evaluate(model, data, s, machine)
    scores = {'loss': mean_loss(forward, model, data, s, machine, pad_id, s.eval_iters * s.batch_size)}
    if data.split == 'val' and s.best_by not in ('', 'loss'):
        scores = task_scores(model, data, machine) | scores
    return scores | shot_scores(model, data, machine)


def shot_scores(model, data, machine):
    """Of `recall`, how well a model learns from what it reads, by the number of examples; of other data nothing."""
    if data.split != 'val' or data.meta.get('source') != 'recall' or hasattr(model, 'encoder'):
        return {}
    end_id = data.tokenizer._special_tokens['<|endoftext|>']
    return signals.hurry(lambda: sample.shot_scores(model, data.tokens, end_id, context=machine.precision), {})


def task_scores(model, data, machine):
    """What sample.py says of labelled data. Each process does all of it: few tokens, and their scores are not sums."""
    def work():
        with machine.precision():
            return sample.task_scores(model, data, data.task, data.labels, data.tokenizer)

    return signals.hurry(work, {'loss': math.nan})


def mean_loss(forward, model, data, s, machine, pad_id, n):
    """The loss of the first n examples, the mean over all targets."""
    def work():
        total, asked = 0.0, 0
        with sample.evaluating(model), machine.precision():
            for first in range(machine.rank * s.batch_size, n, machine.world * s.batch_size):
                batch = get_batch(data, s.objective, model.config.block_size, first, min(s.batch_size, n - first), pad_id,
                                  machine.device)
                total += forward(**batch, counts={'targets': 1})[1].item()
                asked += int((batch['targets'] != IGNORE).sum())
        return total, asked

    total, asked = machine.sum(*signals.hurry(work, (0.0, 0)))
    return total / max(1, asked)


def masked_scores(model, data, n, s, machine):
    """
    n rows of masked_lm: the loss, the share of hidden tokens that are guessed right, that of always guessing the commonest
    token, and of right answers to whether B follows A.
    """
    def work():
        sums = np.zeros(7)
        with sample.evaluating(model), machine.precision():
            for first in range(machine.rank * s.batch_size, n, machine.world * s.batch_size):
                batch = get_batch(data, 'masked_lm', model.config.block_size, first, min(s.batch_size, n - first),
                                  data.tokenizer._special_tokens['[PAD]'], machine.device)
                asked = batch['targets'] != IGNORE
                x, targets = model.hidden(batch['ids'], batch.get('keep'), batch['segments']), batch['targets'][asked]
                questions = [(0, model.fill(x[asked]), targets)]
                if 'next_targets' in batch:
                    questions.append((4, model.follows(x, batch.get('keep')), batch['next_targets']))
                for k, logits, right in questions:
                    sums[k] += cross_entropy(logits, right, 1).item()
                    sums[k + 1] += len(right)
                    sums[k + 2] += (logits.argmax(dim=-1) == right).sum().item()
                sums[3] += (targets == data.commonest).sum().item()
        return sums.tolist()

    nats, asked, right, common, next_nats, pairs, next_right = machine.sum(*signals.hurry(work, [0.0] * 7))
    asked = max(1, asked)
    scores = {'loss': nats / asked, 'masked_accuracy': right / asked, 'commonest_token': common / asked}
    if pairs:
        scores |= {'loss': scores['loss'] + next_nats / pairs, 'next_sentence_accuracy': next_right / pairs}
    return scores


def evaluate(model, data, s, machine):
    """Scores over the whole split. Raises ValueError where an id is out of range."""
    pad_id = data.tokenizer._special_tokens['[PAD]']
    if s.objective not in ('causal_lm', 'masked_lm', *LABELLED):
        windows = len(data.tokens) // model.config.block_size
        return {'loss': mean_loss(model, model, data, s, machine, pad_id, (windows // s.batch_size + 1) * s.batch_size)}
    if s.objective in LABELLED and data.task == 'seq2seq':
        loss = mean_loss(model, model, data, s, machine, pad_id, len(data))
        return {'loss': loss, **task_scores(model, data, machine)}
    if s.objective == 'supervised':
        return task_scores(model, data, machine)
    if s.objective == 'masked_lm':
        return masked_scores(model, data, -(-len(data.tokens) // model.config.block_size), s, machine)
    data.check(data.tokens)
    nats, predictions = machine.sum(*signals.hurry(
        lambda: sample.text_loss(model, data.tokens, rank=machine.rank, world=machine.world, context=machine.precision),
        (0.0, 0)))
    return sample.text_scores(nats, max(1, predictions), data.counts['bytes']) | shot_scores(model, data, machine)


def share(step, s, machine):
    """
    This process's part of the examples of a step: (first, n) of each of its micro-batches. Whole micro-batches where they
    can be dealt out evenly, else an equal slice of each.
    """
    k, n = s.gradient_accumulation_steps, s.batch_size
    if k % machine.world == 0:
        return [((step * k + i) * n, n) for i in range(machine.rank, k, machine.world)]
    if n % machine.world == 0:
        m = n // machine.world
        return [((step * k + i) * n + machine.rank * m, m) for i in range(k)]
    raise ValueError(f"--gradient_accumulation_steps {k} micro-batches of --batch_size {n} cannot be shared by "
                     f"{machine.world} processes: make one of the two a multiple of {machine.world}")


def gradient(step, model, wrapped, data, s, machine, pad_id):
    """
    Leave in .grad the gradient of the mean loss over all targets of the global batch of a step; returns that loss. The
    micro-batches are made first, since each loss is divided by the number of targets in all of them.
    """
    shares, T = share(step, s, machine), model.config.block_size
    batches = [get_batch(data, s.objective, T, first, n, pad_id, machine.device) for first, n in shares]
    counts = count_targets(batches, machine)

    def add_gradient():
        total = 0.0
        for i, ((first, _), batch) in enumerate(zip(shares, batches)):
            torch.manual_seed(int(np.random.SeedSequence((s.seed, first)).generate_state(1)[0]))  # of dropout
            # DDP adds the gradients of all processes in the last backward; it decides that in the forward, so both must
            # lie inside no_sync. It takes the mean, we want the sum.
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or machine.world == 1 else wrapped.no_sync():
                with machine.precision():
                    _, loss = wrapped(**batch, counts=counts)
                machine.scaler.scale(loss * machine.world).backward()
            total = total + loss.detach()
        return total

    loss = add_gradient()
    if s.adversarial:
        with moved_embedding(model, s.adversarial):
            add_gradient()
    if machine.world > 1:
        dist.all_reduce(loss)
    return loss


@contextlib.contextmanager
def moved_embedding(model, distance):
    """
    Inside, the token embeddings stand where the loss just measured is higher: moved by distance * g / |g|, where g is their
    gradient, the fast gradient method of [5], after [6]. The gradient taken there is added to the plain one.
    """
    weight = trunk_of(model).tokens.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += distance * weight.grad / weight.grad.norm().clamp(min=1e-12)
    yield
    with torch.no_grad():
        weight.copy_(before)


def trunk_of(model):
    return model.trunk if isinstance(model, TaskModel) else model


def freeze(model, what):
    """
    Keep some weights as they are: `embeddings`; a number, embeddings and so many blocks; `trunk`, all but the head of a
    task, which makes the head a logistic regression on features. Raises ValueError where nothing would be left to train.
    """
    if what == 'none':
        return
    trunk = trunk_of(model)
    stacks = [m for m in trunk.modules() if isinstance(m, Stack)]
    parts = [trunk] if what == 'trunk' else [trunk.tokens, *(stack.embed for stack in stacks)]
    if what.isdecimal():
        if not stacks or int(what) > trunk.config.n_layer:
            raise ValueError(f"--freeze {what}: the model has {trunk.config.n_layer if stacks else 'no'} blocks")
        parts += [block for stack in stacks for block in stack.blocks[:int(what)]]
    for part in parts:
        part.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"--freeze {what}: nothing is left to train, since there is no head of a task")


def print_sample(model, tokenizer, s):
    """A few words of what the model would write now, so that one can watch it learn; nothing of one that does not write."""
    if not s.sample_tokens or s.objective != 'causal_lm':
        return
    settings = sample.Settings(max_new_tokens=s.sample_tokens, seed=s.seed)
    with sample.evaluating(model):
        text = ''.join(text for _, text in sample.write(model, tokenizer, '', settings))
    print(*(f'    | {line}' for line in text.splitlines() if line.strip()), sep='\n', flush=True)


def duration(seconds):
    """75 -> 1:15"""
    if seconds > 48 * 3600:
        return f"{seconds / 86400:,.1f} days"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


class Log:
    """
    out/log.csv, a row an evaluation, and its picture. On resume the rows behind the checkpoint are dropped. The file is
    written anew each time: it is short, and so it is whole even where somebody removed it or the disk was full.
    """

    COLUMNS = ['step', 'train_loss', 'val_loss', 'lr', 'tokens', 'seconds']

    def __init__(self, folder, step):
        self.path, self.picture = os.path.join(folder, 'log.csv'), os.path.join(folder, 'loss.png')
        self.rows = []
        if step is not None and os.path.exists(self.path):
            with open(self.path, newline='', encoding='utf-8') as f:
                self.rows = [row for row in csv.reader(f) if row and row[0].isdigit() and int(row[0]) <= step]
        self.write()

    def write(self, *values):
        if values:
            self.rows.append([str(values[0]), *(f'{value:.10g}' for value in values[1:])])
        text = ''.join(','.join(row) + '\r\n' for row in [self.COLUMNS, *self.rows])
        os.makedirs(os.path.dirname(self.path) or '.', exist_ok=True)
        write_file(self.path, lambda f: f.write(text.encode()))

    def plot(self):
        """loss.png, where matplotlib is installed."""
        with contextlib.suppress(ImportError, OSError, ValueError, IndexError):  # nor does the log have to be there
            from matplotlib.figure import Figure  # without pyplot: no window, no global state
            rows = np.atleast_1d(np.genfromtxt(self.path, delimiter=',', names=True))
            axes = Figure(figsize=(7, 4)).subplots()
            for name in ('train_loss', 'val_loss'):
                axes.plot(rows['step'], rows[name], label=name.replace('_', ' '))
            axes.set(xlabel='step', ylabel='loss (nats per token)')
            axes.legend()
            axes.figure.savefig(self.picture, dpi=120)


def update(step, loss, model, optimizers, s, machine):
    """
    Move the weights along the gradient: clipped to a norm of grad_clip, at this step's learning rate. Raises ValueError
    before that, where loss or gradient is not finite.
    """
    for optimizer in optimizers:
        machine.scaler.unscale_(optimizer)  # before clipping, or the limit would mean something else [2]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
    finite = bool(norm.isfinite())
    if not loss.isfinite() or not (finite or machine.scaler.is_enabled()):
        raise ValueError(f"step {step}: the {'gradient' if loss.isfinite() else 'loss'} is not finite. The weights are "
                         f"untouched, and {s.out_dir}/ckpt.pt is good: resume with a lower --learning_rate"
                         + (f", or a smaller --adversarial than {s.adversarial}" if s.adversarial else ''))
    rate = learning_rate(step, s)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            muon = isinstance(optimizer, Muon)  # has a peak of its own, and the same schedule
            group['lr'] = rate * s.muon_learning_rate / s.learning_rate if muon else rate
        if finite:  # float16 overflows now and then: then no optimizer steps, and the scale is halved
            machine.scaler.step(optimizer)
        optimizer.zero_grad()
    machine.scaler.update()


def restore(optimizers, scaler, checkpoint):
    """Give optimizers and scaler the state they had."""
    try:
        for optimizer, saved in zip(optimizers, checkpoint['optimizer'], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(checkpoint['scaler'])
    except Exception as e:  # files of strangers hold anything
        raise ValueError(f"the checkpoint does not fit its own model: the state of its optimizer is damaged ({e}): start a "
                         "new run with --init_from and its path") from None


def train(model, data, val, s, tokenizer, checkpoint=None, stop=lambda: False):
    """
    Train `model` on the Data of both splits up to step s.max_iters. Returns {'step', 'evaluated', 'best', 'best_loss',
    'waited', 'seconds'}: how far it came, and when it was last evaluated; the best validation loss (of a task, the best
    score, and its loss); for how many evaluations there was no better one; how long it took. checkpoint: what `load`
    returned, to go on from. stop() is asked before every step; True saves and ends. Writes ckpt.pt, best.pt and log.csv
    into s.out_dir; the ckpt.pt before the last stays as ckpt.prev.pt. Raises as `update` does.
    """
    machine, s = Machine(s), dataclasses.replace(s, objective=s.objective or usual_objective(
        model.config, '' if data.task == 'lm' else data.task))
    model = model.to(machine.device).train()
    data.batch_size = val.batch_size = s.batch_size
    metric = s.best_by or METRICS.get(model.config.task, 'loss')
    sign = 1 if metric == 'loss' else -1
    pad_id = tokenizer._special_tokens['[PAD]']
    optimizers = make_optimizers(model, s, machine.dtype)
    state = {'step': 0, 'evaluated': -1, 'best': sign * math.inf, 'best_loss': math.inf, 'waited': 0, 'seconds': 0.0}
    if checkpoint:
        restore(optimizers, machine.scaler, checkpoint)
        state = {key: checkpoint.get(key, state[key]) for key in state}
        state['evaluated'] = checkpoint.get('evaluated', state['step'])
    first, n = share(0, s, machine)[0]
    forward = compiled(model, get_batch(data, s.objective, model.config.block_size, first, n, pad_id, machine.device),
                       machine, s.compile)
    wrapped = forward
    if machine.world > 1:  # a task does not ask every part of its trunk, nor masked_lm without pairs
        wrapped = DistributedDataParallel(forward, broadcast_buffers=False,
                                          find_unused_parameters=s.objective != 'causal_lm')
    log = Log(s.out_dir, state['step'] if checkpoint else None) if machine.main else None
    tokens_per_step = count_tokens(s, data, model.config)
    began, seconds_before = time.perf_counter(), state['seconds']
    logged_at, logged_step, reached = began, state['step'], False

    # a run that goes on from ckpt.prev.pt must not put a damaged ckpt.pt in its place
    fallen_back = bool(checkpoint) and checkpoint.get('path', '').endswith('ckpt.prev.pt')

    def write_checkpoint(name, **extra):
        if machine.main:
            os.makedirs(s.out_dir, exist_ok=True)  # somebody may have removed it
            save(os.path.join(s.out_dir, name), model, tokenizer=tokenizer_to_dict(tokenizer),
                 task=data.task if s.objective in LABELLED else '', labels=data.labels if s.objective in LABELLED else [],
                 settings=dataclasses.asdict(s), data=data.fingerprint, **state, **extra)

    def write_latest():
        nonlocal fallen_back
        write_checkpoint('ckpt.pt', optimizer=[o.state_dict() for o in optimizers], scaler=machine.scaler.state_dict(),
                         keep=None if fallen_back else os.path.join(s.out_dir, 'ckpt.prev.pt'))
        fallen_back = False

    while True:
        step, now = state['step'], time.perf_counter()
        state['seconds'] = seconds_before + now - began
        interrupted, scores = bool(machine.sum(float(stop()))[0]), None
        if (step % s.eval_interval == 0 or step == s.max_iters) and step != state['evaluated'] and not interrupted:
            train_scores, scores = (estimate(forward, model, d, s, machine, pad_id) for d in (data, val))
            line = f"step {step}: train loss {train_scores['loss']:.4f}, val {sample.format_scores(scores)}"
            if s.target_loss and scores['loss'] <= s.target_loss:  # an estimate: look at all of it
                scores = evaluate(model, val, s, machine)
                reached = scores['loss'] <= s.target_loss
            interrupted = bool(machine.sum(float(signals.caught))[0])  # then these scores are of a part, and do not count
            reached = reached and not interrupted
        if scores and not interrupted:
            machine.say(line)
            state |= {'waited': state['waited'] + 1, 'evaluated': step}
            goodness = (sign * scores[metric], scores['loss'])  # among equal scores the lower loss is better
            if goodness < (sign * state['best'], state['best_loss']) or reached:
                state |= {'best': float(scores[metric]), 'best_loss': float(scores['loss']), 'waited': 0}  # plain numbers
                write_checkpoint('best.pt')
            if machine.main:  # before the checkpoint: rows behind it are dropped on resume, missing ones would stay so
                log.write(step, train_scores['loss'], scores['loss'], learning_rate(step, s), step * tokens_per_step,
                          state['seconds'])
            write_latest()
            if machine.main:
                print_sample(model, tokenizer, s)
            logged_at += time.perf_counter() - now  # the speed in the log is that of the steps
        elif interrupted:
            write_latest()
        tired = s.patience and state['waited'] >= s.patience
        if step >= s.max_iters or interrupted or reached or tired:
            break

        progress(f"step {step} of {s.max_iters}" if machine.main else '')
        loss = gradient(step, model, wrapped, data, s, machine, pad_id)
        update(step, loss, model, optimizers, s, machine)
        state['step'] = step + 1

        if step % s.log_interval == 0:
            now = time.perf_counter()
            speed = (state['step'] - logged_step) / (now - logged_at)  # steps a second
            logged_at, logged_step = now, state['step']
            machine.say(f"iter {step}: loss {loss.item():.4f}, lr {learning_rate(step, s):.2e}, "
                        f"{speed * tokens_per_step:,.0f} tok/s, ETA {duration((s.max_iters - step) / speed)}")
    if reached:
        machine.say(f"target loss {s.target_loss} reached after {state['seconds']:.1f} seconds of training, at step {step}: "
                    f"{sample.format_scores(scores)} over the whole validation split")
    elif interrupted:
        machine.say(f"stopped at step {step}: go on with --init_from resume")
    elif tired:
        machine.say(f"stopped at step {step}: none of the last {state['waited']} evaluations was better")
    elif s.target_loss:
        machine.say(f"target loss {s.target_loss} not reached")
    if machine.main:
        log.plot()
    if machine.world > 1:
        dist.barrier()  # nobody leaves before the last checkpoint is written
    return state

# -----------------------------------------------------------------------------
# What a run costs


class Live(TorchDispatchMode):
    """
    Inside it, `bytes` is the memory of all tensors that have been made and are still there, `peak` the most of it. A tensor
    without memory cannot say how many of its values are True: `asked` of them are.
    """

    def __init__(self, made, asked=None):
        super().__init__()
        self.bytes, self.peak, self.known, self.asked = 0, 0, set(), asked
        tree_map_only(torch.Tensor, self.count, made)

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.bytes -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.asked is not None and function is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            args = (args[0].flatten(0, 1), [args[0].new_zeros(self.asked, dtype=torch.long)])
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, made)
        return made


def rehearse(config, s, batches, machine):
    """
    One step as it would be, but on tensors that have a shape and no memory: (bytes of the weights, of their gradients, of
    the optimizer, of activations at the peak; FLOPs of the products). Works for models that no machine could hold.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: they take a second to import
    from torch.utils.flop_counter import FlopCounterMode
    flops, asked = FlopCounterMode(display=False), max(int((batch['targets'] != IGNORE).sum()) for batch in batches)
    with FakeTensorMode() as fake, torch.device(machine.device):
        model = build(config).train()
        for module in model.modules():  # tables of positions are made on the CPU
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(machine.device))
        freeze(model, s.freeze)
        optimizers = make_optimizers(model, s, machine.dtype)
        batches = [{key: fake.from_tensor(t) for key, t in batch.items() if config.arch != 'lstm' or key != 'keep'}
                   for batch in batches]
        with Live(list(model.parameters()), asked) as live, flops:
            weights = live.bytes
            for batch in batches:
                with machine.precision():
                    _, loss = model(**batch, counts={'targets': 1})
                loss.backward()
                del loss
            gradients, peak = live.bytes - weights, live.peak
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state = live.bytes - weights
    return weights, gradients, state, peak - weights - gradients, flops.get_total_flops()


def product_speed(config, machine):
    """FLOPs a second of the product that an MLP begins with, measured for a fifth of a second."""
    rows, inner = 2048, config.mlp_dim or 4 * config.n_embd
    a, b = (torch.randn(shape, dtype=machine.dtype, device=machine.device)
            for shape in ((rows, config.n_embd), (config.n_embd, inner)))
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.2 or n < 2:
        (a @ b)[0, 0].item()  # waits for the device
        n += 1
        if n == 1:
            began = time.perf_counter()  # the first call prepares much
    return 2 * rows * config.n_embd * inner * (n - 1) / (time.perf_counter() - began)


def sizes_of(model):
    """{part: parameters}"""
    sizes = {}
    for name, p in model.named_parameters():
        part = name.removeprefix('trunk.').split('.')[0]
        if '.blocks.' in name or part == 'lstm':
            part = 'blocks'
        elif '.embed.' in name:
            part = 'positions'
        elif part not in ('tokens', 'output', 'head'):
            part = 'the rest'
        sizes[part] = sizes.get(part, 0) + p.numel()
    return sizes


def memory_of(machine):
    """Bytes of the device, 0 where it does not say."""
    if machine.device.startswith('cuda'):
        return torch.cuda.get_device_properties(machine.device).total_memory
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else 0


def dry_run(model, s, data, machine):
    """Print what a run needs, before it spends it: memory for its longest batch, products, time, devices."""
    longest, shares = 0, share(0, s, machine)[:2]  # the gradients of the first are there when the second is computed
    if isinstance(data, Examples):
        data.examples_of([0])
        longest = int(data.lengths[data.order].sum(axis=1).argmax()) // s.batch_size * s.batch_size
    batches = [get_batch(data, s.objective, model.config.block_size, longest + first, n,
                         data.tokenizer._special_tokens['[PAD]'], machine.device) for first, n in shares]
    *parts, flops = rehearse(model.config, s, batches, machine)
    sizes, tokens = sizes_of(model), count_tokens(s, data, model.config)               # of a step
    n, seen = sum(sizes.values()), tokens * s.max_iters
    flops /= sum(batch[key].numel() for batch in batches for key in batch if key.endswith('ids'))  # a token
    if model.config.arch == 'lstm':
        flops += 6 * sizes['blocks']  # the products inside of its gates are not seen
    # Measured on a CPU: torch and what it loads, and a heap with gaps between tensors of all sizes.
    fixed, gaps = (0.33e9, 1.45) if machine.device == 'cpu' else (0.5e9, 1.1)
    need, have = fixed + sum(parts[:3]) + gaps * parts[3], s.device_memory * 1e9 or memory_of(machine)
    speed = s.device_speed * 1e12 or 0.5 * product_speed(model.config, machine)
    for name, text in [
        ('parameters', f"{n:,}: " + ', '.join(f"{part} {size:,}" for part, size in sizes.items())),
        ('tokens', f"{tokens:,} a step, {seen / 1e6:,.1f} M in {s.max_iters:,} steps: {seen / data.counts['tokens']:,.1f} "
                   f"times the data, {seen / n:,.2f} a parameter (with about 20, compute is spent best [8])"),
        ('compute', f"{flops / 1e6:,.1f} MFLOPs a token (6 a parameter would be {6 * n / 1e6:,.1f}), "
                    f"{flops * seen / 1e12:,.1f} TFLOPs in all"),
        ('memory', ', '.join(f"{part} {size / 1e9:,.3f}" for part, size in zip(
            ('weights', 'gradients', 'optimizer', 'activations'), parts))
                   + f"; with the program and gaps {need / 1e9:,.2f} GB"),
        ('time', f"{duration(flops * seen / speed)} without evaluations, at {speed / 1e9:,.0f} GFLOP/s"
                 + ('' if s.device_speed else ', half of what a product reaches here')),
        ('devices', f"one{f' of {have / 1e9:,.1f} GB' if have else ''} is enough, and up to "
                    f"{s.gradient_accumulation_steps * s.batch_size} can share a step" if need <= (have or math.inf) else
                    f"one of {have / 1e9:,.1f} GB is too small, and each holds a whole copy: lower --batch_size, or take "
                    f"larger ones. Programs that split a model would need {math.ceil(need / have)}"),
    ]:
        machine.say(f'{name:11}{text}')

# -----------------------------------------------------------------------------
# The script


def find_dataset(name, machine):
    """The folder of a data set. Plain pydoc is made on the spot, since it needs no network."""
    folder = name if os.path.exists(os.path.join(name, 'meta.json')) else os.path.join('data', name)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        if name != 'pydoc':
            known = f"python prepare_data.py --dataset {name}" if name in prepare_data.DATASETS else \
                f"python prepare_data.py --input FILE --out_dir data/{name}"
            raise ValueError(f"--dataset {name}: there is no data folder {folder}: make it with {known}")
        if machine.main:
            machine.say("preparing data/pydoc from the documentation of this Python")
            prepare_data.prepare(prepare_data.Settings(dataset='pydoc'))
    if machine.world > 1:
        dist.barrier()  # nobody reads it before it is written
    return folder


def find_origin(s, given):
    """(path, resume): the checkpoint to start from, None for random weights, and whether its run is to go on."""
    if s.eval_only and 'init_from' not in given:
        return s.out_dir, False
    latest, before = (os.path.join(s.out_dir, name) for name in ('ckpt.pt', 'ckpt.prev.pt'))
    there = [path for path in (latest, before) if os.path.exists(path)]  # both, unless a save was cut short
    if s.init_from == 'auto' and len(there) == 2:
        try:
            read_checkpoint(latest)
        except ValueError:
            if os.environ.get('RANK', '0') == '0':
                print(f"{latest} is not a whole checkpoint: going on from the one before, {before}", flush=True)
            there = [before]
    if s.init_from == 'resume' or (s.init_from == 'auto' and there):
        return (there or [latest])[0], not s.eval_only
    return (None if s.init_from in ('scratch', 'auto') else s.init_from), False


def from_checkpoint(path, resume, s, settings_given, config_given):
    """
    (model, checkpoint, settings). The architecture is the checkpoint's; so are the settings of a run that goes on, except
    for the flags that were given. A new run keeps preset and data set. Raises ValueError where those contradict what the
    weights are.
    """
    free = ('dropout',) if resume else ('dropout', 'block_size')  # the steps of one run read windows of one length
    model, checkpoint = sample.open_model(path, **{key: config_given[key] for key in free if key in config_given})
    saved = {key: value for key, value in checkpoint.get('settings', {}).items() if hasattr(s, key)}
    fixed = {key: getattr(model.config, key) for key in config_given}
    of_optimizer = ('optimizer', 'freeze') if resume else ()
    fixed |= {key: saved[key] for key in ('preset', *of_optimizer) if key in saved}
    for key, value in fixed.items():
        asked = {**settings_given, **config_given}.get(key, value)
        if asked != value:
            raise ValueError(f"--{key} {asked}: {path} has {key}={value}, which its weights "
                             f"{'and optimizer ' if key in of_optimizer else ''}are made for: leave the flag "
                             "out, or start "
                             + (f"a new run with --init_from {path}" if key in of_optimizer else "from scratch"))
    if resume and not {'optimizer', 'scaler', 'step'} <= checkpoint.keys():
        raise ValueError(f"{path} has no state of an optimizer, so it cannot be resumed: start a new run from it with "
                         f"--init_from {path}")
    if resume or s.eval_only:  # the folder may have been moved or renamed since: it is the one that was asked for
        return model, checkpoint, Settings(**{**saved, 'eval_only': False, 'out_dir': s.out_dir, **settings_given})
    known = {key: saved[key] for key in ('preset', 'dataset') if key in saved}
    return model, checkpoint, Settings(**{**known, **settings_given})


def start(given):
    """
    The flags that were given -> (model, settings, tokenizer, train data, val data, checkpoint, machine), where checkpoint
    is None unless the run is resumed. Raises ValueError or OSError, before anything is written.
    """
    names = {f.name for f in dataclasses.fields(Settings)}
    settings_given = {key: value for key, value in given.items() if key in names}
    config_given = {key: value for key, value in given.items() if key not in names}
    s = Settings(**settings_given)
    path, resume = find_origin(s, given)
    checkpoint = None
    if path is not None:
        model, checkpoint, s = from_checkpoint(path, resume, s, settings_given, config_given)
        checkpoint['path'] = path
    machine = Machine(s)
    folder = find_dataset(s.dataset, machine)
    data, val = (open_data(folder, split, s.seed) for split in SPLITS)
    val.tokenizer = data.tokenizer
    task = '' if data.task == 'lm' or s.objective not in ('', *LABELLED) else data.task
    head = '' if task == 'seq2seq' else task  # text to text needs none
    goes_on = resume or (path is not None and s.eval_only)
    if not goes_on:
        advice = recipe(task or 'lm', s.preset, goes_on=path is not None and not task)
        s = dataclasses.replace(s, **{**{key: advice[key] for key in advice if key in names}, **settings_given})
        config_given = {**{key: advice[key] for key in advice if key not in names}, **config_given}
    if not s.eval_only:
        share(0, s, machine)  # raises where the processes cannot share a step
    arch = PRESETS[s.preset].arch if path is None else model.config.arch
    if head and arch == 'encdec':
        raise ValueError(f"{folder} is for {head}: an encoder-decoder answers with text, so prepare it as --task seq2seq or "
                         "choose another --preset")
    for name, there in (('task', head), ('n_labels', len(data.labels) if head else 0)):
        if config_given.setdefault(name, there) != there:
            raise ValueError(f"--{name} {config_given[name]}: {folder} has {name}={there!r}: leave the flag out")
    if path is None:
        config_given.setdefault('vocab_size', data.vocab_size)
        if config_given['vocab_size'] < data.vocab_size:
            raise ValueError(f"--vocab_size {config_given['vocab_size']}: the data has {data.vocab_size} different tokens")
        torch.manual_seed(s.seed)
        preset = PRESETS[s.preset]
        if preset.mlp_dim and 'n_embd' in config_given:  # as wide, in proportion
            config_given.setdefault('mlp_dim', max(1, preset.mlp_dim * config_given['n_embd'] // preset.n_embd))
        config = dataclasses.replace(preset, **config_given)
        sizes = ('vocab_size', 'block_size', 'n_head', 'n_embd', 'head_dim', 'mlp_dim', 'segments')
        for name, most in {'n_layer': 10_000, **dict.fromkeys(sizes, 2 ** 31)}.items():
            if getattr(config, name) > most:
                raise ValueError(f"--{name} {getattr(config, name)}: must be at most {most}")
        try:
            model = shapes_of(config, '--dry_run', math.inf) if s.dry_run else build(config)
        except (RuntimeError, MemoryError):
            raise ValueError("a model of these sizes has no room in memory: lower --n_embd, --vocab_size or "
                             "--block_size") from None
    else:
        if checkpoint.get('tokenizer') and checkpoint['tokenizer'] != tokenizer_to_dict(data.tokenizer):
            raise ValueError(f"{folder} was encoded with another tokenizer than {path} was trained on: prepare it again "
                             "with --tokenizer and the data folder of that training")
        torch.manual_seed(s.seed)
        if data.task != 'lm' and data.vocab_size > model.config.vocab_size and not resume:
            added = data.vocab_size - model.config.vocab_size
            model = resized(model, path, vocab_size=data.vocab_size)
            machine.say(f"{path}: {added} rows added to its vocabulary, for special tokens that it lacks")
        if max(data.text_ids.max(), data.tokenizer._special_tokens['<|endoftext|>']) >= model.config.vocab_size:
            raise ValueError(f"{path} knows {model.config.vocab_size} tokens, and {folder} has others: prepare it with the "
                             "tokenizer of the model")
        fresh = [name for name in checkpoint.get('new', []) if not head or 'pooler' in name]  # a task asks no other old head
        for what, names in (('left out', checkpoint.get('dropped')), ('new', fresh)):
            if names:
                machine.say(f"{path}: {what}: {', '.join(sorted({re.sub(r'[0-9]+', '*', name) for name in names}))}")
        model = with_head(model, checkpoint, path, head, data, machine, goes_on, config_given)
        if resume and checkpoint.get('data', data.fingerprint) != data.fingerprint:
            raise ValueError(f"--dataset {s.dataset}: {folder} is not, or no longer, what {path} was trained on: a run goes "
                             f"on with the same data; with other data start a new one, --init_from {path}")
    s = dataclasses.replace(s, objective=s.objective or usual_objective(model.config, task))
    check_objective(s, model.config, task, folder)
    data.batch_size = val.batch_size = s.batch_size
    needed = {'masked_lm': '[MASK]', 'span_corruption': '<extra_0>'}.get(s.objective, '<|endoftext|>')
    if needed not in data.tokenizer._special_tokens:
        raise ValueError(f"--objective {s.objective}: the tokenizer of {folder} has no {needed}: choose another tokenizer")
    if s.objective in ('masked_lm', 'span_corruption') and model.config.block_size < 8:
        raise ValueError(f"--block_size {model.config.block_size}: {s.objective} needs at least 8")
    for split in (data, val):
        split.check_length(model.config.block_size, whole=s.objective == 'completion')
    freeze(model, s.freeze)
    return model, s, data.tokenizer, data, val, checkpoint if resume else None, machine


def usual_objective(config, task=''):
    """What a model is trained on unless a flag says otherwise. task: what the data is for, '' if it is plain text."""
    if task == 'seq2seq' and config.arch != 'encdec':
        return 'completion'
    if task or config.task:
        return 'supervised'
    return {'bert': 'masked_lm', 'encdec': 'span_corruption'}.get(config.arch, 'causal_lm')


def check_objective(s, config, task, folder):
    """Raise ValueError where a model cannot be trained on an objective, or the data has not what it needs."""
    asks = f"--objective {s.objective}"
    if s.objective in LABELLED and not task:
        raise ValueError(f"{asks}: {folder} has no labels: prepare labelled data, or leave the flag out")
    if s.objective in LABELLED and (s.objective == 'completion') != (task == 'seq2seq' and config.arch != 'encdec'):
        raise ValueError(f"{asks}: does not fit {folder} and a {config.arch}: leave the flag out")
    if task == 'seq2seq' and config.arch == 'bert':
        raise ValueError(f"{folder} asks for texts, and a bert cannot write: choose another --preset, such as transformer")
    if s.best_by not in ('', 'loss') and not (task == 'seq2seq' and s.objective in LABELLED):
        raise ValueError(f"--best_by {s.best_by}: only text to text has that score: leave the flag out")
    fits = {'causal_lm': ('gpt', 'lstm'), 'masked_lm': ('bert',), 'span_corruption': ('encdec',)}.get(s.objective)
    if fits and config.arch not in fits:
        raise ValueError(f"{asks} is not for a {config.arch}" + (
            ", which would see the answer, since every token sees all others: use masked_lm" if config.arch == 'bert' else
            ", which sees only the past: use causal_lm, or --preset bert" if config.arch in ('gpt', 'lstm') else
            ": use span_corruption"))


def with_head(model, checkpoint, path, task, data, machine, fixed, config_given):
    """
    The model of a checkpoint, asked for `task` ('': pre-training): the trunk stays, a head that was made for something else
    is replaced by a new one. Raises ValueError where that cannot be, as when a run is resumed.
    """
    if model.config.task == task and (not task or checkpoint.get('labels') == data.labels):
        return model
    if fixed:
        raise ValueError(f"{path} was trained for {model.config.task or 'pre-training'} with the labels "
                         f"{checkpoint.get('labels')}, {data.folder} is for {task or 'pre-training'} with {data.labels}: "
                         "choose another --dataset")
    trunk = trunk_of(model)
    if not task:
        machine.say(f"{path}: the trunk alone, without its head for {model.config.task}")
        return trunk
    fresh = build(dataclasses.replace(trunk.config, **config_given))
    fresh.trunk.load_state_dict(trunk.state_dict())
    machine.say(f"{path}: trunk loaded, its tokenizer is that of {data.folder}; new: a head for {task}"
                + (f" with the labels {', '.join(data.labels)}" if data.labels else ''))
    return fresh


def set_aside(folder):
    """A new run in an old folder: what the old one left gets another name. Nothing is ever overwritten in silence."""
    for name in ('ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'log.csv', 'config.toml'):
        old, new = os.path.join(folder, name), os.path.join(folder, '.old'.join(os.path.splitext(name)))
        if os.path.exists(old):
            print(f"{old} is of an earlier run: moved to {new}"
                  + (", in the place of one still older" if os.path.exists(new) else ''), flush=True)
            os.replace(old, new)


def flags_of(s, config):
    """out/config.toml: all flags of a run, so that --config repeats it. What weights or data decide is left to them."""
    once = ('config', 'eval_only', 'dry_run', 'device_memory', 'device_speed')
    flags = {name: value for name, value in dataclasses.asdict(s).items() if name not in once}
    mine = dataclasses.asdict(config)
    names = ('block_size', 'dropout') if s.init_from not in ('scratch', 'auto') else [
        name for name in mine if name not in ('task', 'n_labels', 'vocab_size')]
    return prepare_data.write_config(flags | {name: mine[name] for name in names}, [
        'python train.py --config this_file', f"the data says: vocab_size = {config.vocab_size}"])


def train_and_report(model, s, tokenizer, data, val, checkpoint, machine):
    """Say what is trained, train it, say how it went. Returns the exit status: 128 + the signal that ended it, or 0."""
    if machine.main:
        os.makedirs(s.out_dir, exist_ok=True)
        if checkpoint is None:
            set_aside(s.out_dir)
            flags = flags_of(s, model.config).encode()
            write_file(os.path.join(s.out_dir, 'config.toml'), lambda f: f.write(flags))
    n = sum(p.numel() for p in model.parameters())
    machine.say(f"{s.preset}: {n:,} parameters, {str(machine.dtype).removeprefix('torch.')} on {machine.device}"
                + (f", {machine.world} processes" if machine.world > 1 else '')
                + f"; {data.folder}: {data.counts['tokens']:,} tokens, "
                + (f"{len(data):,} examples, " if isinstance(data, Examples) else '') + f"vocabulary of {data.vocab_size:,}"
                + (f"; resumed at step {checkpoint['step']}" if checkpoint else ''))
    if s.objective == 'masked_lm' and not data.has_pairs:
        machine.say(f"{data.folder} has no two documents with sentences that follow each other: trained without the "
                    "question whether the second text follows the first")
    signals.listen()
    state = train(model, data, val, s, tokenizer, checkpoint, stop=lambda: bool(signals.caught))
    numbers = (signal.SIGINT, signal.SIGTERM)
    caught = [n for n, came in zip(numbers, machine.sum(*(float(signals.caught == n) for n in numbers))) if came]
    if caught:
        return 128 + caught[0]
    machine.say(f"done: {state['step']} steps in {duration(state['seconds'])}, best validation "
                f"{s.best_by or METRICS.get(model.config.task, 'loss')} {state['best']:.4f}. "
                f"Ask the model: python sample.py --out_dir {s.out_dir} --start \"...\"")
    return 0


def main(argv):
    given = read_flags(argv, __doc__, {'training': Settings, 'architecture (defaults: the preset\'s)': Config})
    model, s, tokenizer, data, val, checkpoint, machine = start(given)
    status = 0
    try:
        if s.dry_run:
            dry_run(model, s, data, machine)
        elif s.eval_only:
            machine.say('val ' + sample.format_scores(evaluate(model.to(machine.device), val, s, machine)))
        else:
            status = train_and_report(model, s, tokenizer, data, val, checkpoint, machine)
    except torch.OutOfMemoryError as e:
        raise ValueError(f"{machine.device} has not enough memory: lower --batch_size (and raise "
                         "--gradient_accumulation_steps) or --block_size") from e
    if machine.world > 1:
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == '__main__':
    run(main)
