"""
Train any model of model.py with one loop.

    python train.py                                           a small GPT on Python's documentation
    python train.py --dataset shakespeare --preset gpt2       another text, another row of PRESETS
    python train.py --init_from resume                        go on as if it had never stopped
    python train.py --preset bert --out_dir out-bert          fill gaps in the text, as BERT does
    python train.py --init_from out-bert --dataset pytopics   fine-tune it on labelled data
    torchrun --nproc_per_node=4 train.py --gradient_accumulation_steps 4

The data flow, which is all that the loop knows of a task:

    data --objective--> examples --collate--> batch --model(**batch)--> (logits, loss)

An example is a dict of arguments of model.forward(), and `meta`, which the model does not get. What
a step does depends only on the checkpoint and on the number of the step: example i is drawn from
(seed, i), the order of an epoch from (seed, epoch), dropout from (seed, number of the first
example). So no loader is saved, and a resumed run equals an unbroken one, on a CPU bit for bit.

The file goes from objectives and data over optimizers and settings to a step, evaluation and the
loop, Trainer.run. Then come precision and processes, the cost of a run, and start(), which
turns flags into all that the loop needs.
"""

import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import prepare_data
import sample
from model import (IGNORE_INDEX, PRESETS, Config, TaskModel, build, num_parameters,
                   optimizer_groups, reading, require, resize, save, write_file)
from prepare_data import (STOPS, add_special_tokens, check_flags, flag, load_tokenizer, pick,
                          progress, read_flags, run, shell_word, to_stderr, write_config)

# -----------------------------------------------------------------------------
# Objectives: what does the model see, and what must it predict? Each makes one example. Of `data`,
# a Data (below), window(i, T) is window i of a text, T + 1 tokens (fewer at the end of val), row(i)
# a row of labelled data, rng(1, i) the generator of random numbers for example i, and is_text (V,)
# false for special tokens.

def causal_lm(data, index, T):
    """
    At every position: which token comes next?

        text      T h e   c a t
        ids       T h e   c a
        targets   h e   c a t         shifted here: the model shifts nothing
    """
    window = data.window(index, T)
    return {'ids': window[:-1], 'targets': window[1:]}

def masked_lm(data, index, T):
    """
    Which tokens are hidden, and does text B follow text A? Section 3.1 of Devlin et al. 2018, BERT,
    https://arxiv.org/abs/1810.04805

        text          the cat sat . it purred .
        ids           [CLS] the [MASK] sat .  [SEP] it  dog   .   [SEP]
        segments        0    0    0     0  0    0    1   1    1     1
        targets         -    -   cat    -  -    -    -  purred -    -       - is IGNORE_INDEX
        next_targets  1                                                     B follows A

    (A text this short would have one target, not two.) Rows of labelled data have no next_targets;
    nor has a text of a single document, or one in which no sentence follows another.
    """
    rng, example = data.rng(1, index), {}
    if data.rows:
        example = pick(data.row(index), 'ids', 'segments')
    else:
        if data.has_pairs:
            *texts, example['next_targets'] = sentence_pair(data, rng, T - 3)
        else:
            texts = [data.window(index, T - 2)[:-1].tolist()]
        example['ids'], example['segments'] = add_special_tokens(data.tokenizer, *texts)
    example['ids'], example['targets'] = hide_tokens(np.array(example['ids']), data, rng)
    return example

def sentence_pair(data, rng, room):
    """
    Two texts A and B of at most `room` tokens together, and 1 if B follows A, else 0. In half of
    the pairs B follows; else B is from another document: in the same one it might fit. A has at
    most a random share of the room, a quarter to three quarters. If the texts are too long, A
    loses its beginning and B its end, so that B still begins where A ends.
    """
    # of each sentence: its first token, its document; and which sentences another one follows
    starts, document, followed = data.sentences
    first = followed[rng.integers(len(followed))]                          # A's first sentence
    length = rng.integers(room // 4, 3 * room // 4 + 1)                    # of A, at most
    low, high = np.searchsorted(document, document[first] + [0, 1])        # A's is low:high
    fitting = np.searchsorted(starts[first + 1:high], starts[first] + length, side='right')
    after = first + max(1, fitting)                                        # the sentence after A
    follows = rng.random() < 0.5
    second = after                                                         # B's first sentence
    if not follows:
        second = rng.integers(len(document) - (high - low))                # of other documents,
        second += (high - low) * (second >= low)                           # skipping A's
    a = data.tokens[max(starts[first], starts[after] - length):starts[after]]
    end = starts[np.searchsorted(document, document[second] + 1)]          # of B's document
    b = data.tokens[starts[second]:end][:room - len(a)]
    text_of = data.tokenizer.text_of
    return text_of(a).tolist(), text_of(b).tolist(), int(follows)

def hide_tokens(ids, data, rng):
    """
    ids (T,) -> (what the model sees, targets). 15 % of the text tokens are to be predicted, at
    least one. Of those, 80 % are shown as [MASK], 10 % as a random token, and 10 % as they are:
    fine-tuning has no [MASK], so outputs at other tokens, right or wrong, must be trained, too.
    """
    places = np.flatnonzero(data.is_text[ids])                             # no special token
    shown, targets = ids.copy(), np.full_like(ids, IGNORE_INDEX)
    chosen = rng.permutation(places)[:max(1, round(0.15 * len(places)))]
    targets[chosen] = ids[chosen]
    action = rng.random(len(chosen))
    shown[chosen[action < 0.8]] = data.tokenizer.id('[MASK]')
    replaced = chosen[(action >= 0.8) & (action < 0.9)]
    shown[replaced] = rng.choice(np.flatnonzero(data.is_text), len(replaced))
    return shown, targets

def span_corruption(data, index, T):
    """
    Text-to-text from plain text, section 3.1.4 of Raffel et al. 2019, T5,
    https://arxiv.org/abs/1910.10683: runs of tokens are hidden, 15 % of all tokens, three to a run
    on average (section 3.3.4). A sentinel replaces each run, and the target says what it replaces.
    (The figure hides more, as does the paper's, whose target ends with one more sentinel.)

        text           Thank you for inviting me to your party last week
        ids            Thank you <extra_0> me to your party <extra_1> <|endoftext|>
        decoder_ids    <|endoftext|> <extra_0> for inviting <extra_1> last week
        targets        <extra_0> for inviting <extra_1> last week <|endoftext|>
    """
    rng, tokenizer = data.rng(1, index), data.tokenizer
    source, target = tokenizer.source_ids, []  # most tokenizers have no source_ids
    tokens = data.window(index, T - len(source))[:-1].tolist()
    n = len(tokens)
    hidden = max(1 if n < 3 else 2, round(0.15 * n))  # with one hidden, ids would have T + 1 tokens
    spans = max(1, min(100, round(hidden / 3), n - hidden))  # there are 100 sentinels

    def cut(total):
        """Cut `total` tokens into `spans` runs of at least one, all ways being equally likely."""
        places = 1 + rng.permutation(max(0, total - 1))[:spans - 1]
        return np.diff(sorted([0, *places, total]))

    for i, (shown, gone) in enumerate(zip(cut(n - hidden), cut(hidden))):
        sentinel = tokenizer.id(f'<extra_{i}>')
        source += [*tokens[:shown], sentinel]
        target += [sentinel, *tokens[shown:shown + gone]]
        tokens = tokens[shown + gone:]
    return {'ids': [*source, tokenizer.end_id], 'decoder_ids': [tokenizer.start_id, *target],
            'targets': [*target, tokenizer.end_id]}

def supervised(data, index, T):
    """Labelled data, as prepare_data.py wrote them."""
    return data.row(index)

def completion(data, index, T):
    """
    Text to text without an encoder: the source is a prompt, and only the target is predicted.

        ids       twenty one [SEP] 2 1
        targets   .      .   2     1 <|endoftext|>        a dot is IGNORE_INDEX
    """
    row = data.row(index)
    prompt, target = row['ids'][:-1], row['targets']  # [SEP] replaces its end token
    return {'ids': [*prompt, data.tokenizer.id('[SEP]'), *target[:-1]],
            'targets': [IGNORE_INDEX] * len(prompt) + target}

@dataclass
class Objective:
    example: object      # (data, index, T) -> example, of at most T tokens if it is cut from text
    archs: tuple         # the models that can learn it
    tasks: tuple = ('',)  # of the data; '': text, or labelled data without its labels
    by_rows: bool = True  # takes labelled data row by row, not as one text
    shortest: int = 1    # block_size that has room for an example

# tasks for which the model gets a head
HEADS = [name for name, task in prepare_data.TASKS.items() if task.has_head]
OBJECTIVES = {  # the first row that fits is the default: put yours last
    'causal_lm': Objective(causal_lm, ('gpt', 'lstm'), by_rows=False),
    'masked_lm': Objective(masked_lm, ('bert',), shortest=5),
    'span_corruption': Objective(span_corruption, ('encdec',), by_rows=False, shortest=4),
    'supervised': Objective(supervised, ('gpt', 'bert', 'lstm'), HEADS),
    'text_to_text': Objective(supervised, ('encdec',), ('seq2seq',)),
    'completion': Objective(completion, ('gpt', 'lstm'), ('seq2seq',)),
}

# -----------------------------------------------------------------------------
# Data

SPLITS = {'train': 0, 'val': 1}
# The end of a sentence and all up to the next one: white space (U+3000 is CJK's), closing marks.
# It is a pattern of bytes, since a character may be several tokens.
ENDS, CLOSING = '。|｡|！|？|।|॥|۔|؟|።|։|။|។', '”|’|）|」|』|】|》|\u3000'
SENTENCE_END = re.compile(
    rf'(\A|\n|[.!?](?=\s)|({ENDS})["\']*)(\s|{ENDS}|{CLOSING})*'.encode())

class Data:
    """
    One split of a folder that prepare_data.py wrote. tokens: all ids, one after another. rows: the
    examples of labelled data, each a line of its .jsonl file; [] for text, or if start() takes the
    data as one text. batch_size: examples in a whole step, for row_order.
    """

    def __init__(self, folder, split, seed=0, batch_size=1):
        self.folder, self.split, self.seed, self.batch_size = folder, split, seed, batch_size
        self.tokenizer, self.rows = load_tokenizer(folder), []
        with reading(folder, "prepare the data again"):
            meta = json.loads(Path(folder, 'meta.json').read_bytes())
            require(meta['format'] == 'plainformer data 2', "its format is that of another version")
            self.task = '' if meta['task'] == 'lm' else meta['task']
            self.labels, self.vocab_size = meta['labels'], meta['vocab_size']
            self.counts, self.block_size = meta['counts'][split], meta.get('block_size')
            self.fingerprint = [meta['sha256'], meta['counts']]            # differs for other data
            self.is_text = np.ones(self.vocab_size, bool)                  # no special token
            self.is_text[[*self.tokenizer.special.values()]] = False
            if self.task:
                with open(f'{folder}/{split}.jsonl', encoding='utf-8') as f:
                    self.rows = [json.loads(line) for line in f]
                sizes = [(len(row['ids']), len(row.get('decoder_ids', []))) for row in self.rows]
                self.longest, self.lengths = np.max(sizes), np.sum(sizes, axis=1)
                self.tokens = np.concatenate([row['ids'] for row in self.rows])
            else:
                ids = np.memmap(f'{folder}/{split}.bin', meta['dtype'], mode='r')
                self.tokens = np.asarray(ids)
            self.highest, total = self.tokens[:10 ** 8].max(), self.counts['tokens']  # all: slow
            n = sum(self.lengths) if self.task else len(self.tokens)
            require(self.highest < self.vocab_size and n == total, f"{split} holds {n} ids up to "
                    f"{self.highest}, and should hold {total} below {self.vocab_size}")

    def rng(self, *numbers):
        """The generator of this key: rows (0, epoch), examples (1, index), offsets (2, epoch)."""
        return np.random.default_rng((self.seed, SPLITS[self.split], *numbers))

    def windows(self, T):
        """The number of windows in an epoch; each has T tokens, and the next as its last target."""
        last = len(self.tokens) - 1
        if last < T:
            raise ValueError(f"{self.folder} has {last + 1} tokens in {self.split}, fewer than "
                             f"block_size + 1 = {T + 1}: lower --block_size, or prepare more text")
        if self.split == 'val':
            return -(-last // T)                                           # the last may be shorter
        return max(1, last // T - 1)                                       # room for an offset

    def window(self, index, T):
        """
        The T + 1 tokens of window `index`. Training takes all windows of an epoch once, in random
        order and with a random offset; validation takes them in the order of the text.
        """
        n, start = self.windows(T), index * T
        if self.split == 'train':
            epoch, k = divmod(index, n)
            offset = self.rng(2, epoch).integers(len(self.tokens) - n * T)
            start = offset + epoch_order(n, self.seed, epoch)[k] * T
        return self.tokens[start:start + T + 1].astype(np.int64)

    def row(self, index):
        """Row `index` of labelled data; training takes each once an epoch, as row_order says."""
        if self.split == 'val':
            return self.rows[index]
        epoch, k = divmod(index, len(self.rows))
        return self.rows[row_order(self, epoch)[k]]

    @functools.cached_property
    def sentences(self):
        """
        (starts, document, followed). A sentence ends after . ! ? before white space, after
        。！？।۔؟ and at line ends; a document ends at <|endoftext|>.

            starts      the first token of each of n sentences, then the end of the text, (n + 1,)
            document    the number of the document of each sentence, (n,)
            followed    the sentences that are followed by another one of their document

            One . ␣Two ? ␣3 . 14 ⏎ Four <|endoftext|> Five
            ^     ^      ^         ^                  ^
        """
        bytes_of = [self.tokenizer.token_bytes(i) for i in range(self.vocab_size)]
        bytes_of[self.tokenizer.end_id] = b'\n'
        ends = np.flatnonzero(self.tokens == self.tokenizer.end_id) + 1    # of documents
        starts, n = [], 0
        for tokens in np.split(self.tokens, ends):
            parts = [bytes_of[i] for i in tokens.tolist()]
            begins = [match.end() for match in SENTENCE_END.finditer(b''.join(parts))]  # in bytes
            found = np.searchsorted(np.cumsum([*map(len, parts)]), begins, side='right')
            starts.append(n + found[found < len(tokens)])                  # tokens that hold them
            n += len(tokens)
        starts = np.unique(np.concatenate([*starts, [n]]))
        document = np.searchsorted(ends, starts[:-1], side='right')        # how many end before
        followed = np.flatnonzero(document[1:] == document[:-1])
        return starts, document, followed

    @functools.cached_property
    def has_pairs(self):
        """Whether there are two documents, and sentences that follow each other."""
        _, document, followed = self.sentences
        return len(followed) > 0 and document[0] != document[-1]

@functools.lru_cache(maxsize=4)
def epoch_order(n, *key):
    """The order of the windows of an epoch (n,)."""
    return np.random.default_rng(key).permutation(n)

@functools.lru_cache(maxsize=4)
def row_order(data, epoch):
    """
    A random order of all rows of a Data (n,), in which a batch (in brackets) has rows of about one
    length, to need little padding. Only a batch that spans two epochs has rows of any length:

        epoch 0    [6 7 8 9] [0 1 2 5] 4 3          10 rows, numbered by length, in batches of 4
        epoch 1    6 2 [0 1 3 4] [5 7 8 9]
    """
    n, size, rng = len(data.rows), data.batch_size, data.rng(0, epoch)
    order = rng.permutation(n)
    begin = -epoch * n % size  # rows that complete the last batch of the epoch before: 0, 2
    middle = order[begin:begin + (n - begin) // size * size]               # the brackets; a view
    noisy = data.lengths[middle] * rng.uniform(1, 1.1, len(middle))        # new batches each epoch
    batches = middle[noisy.argsort()].reshape(-1, size)
    middle[:] = rng.permutation(batches).flatten()                         # a view: changes `order`
    return order

def get_batch(data, objective, T, first, n):
    """The examples first, first + 1, ..., first + n - 1 since the start of training, as a batch."""
    examples = [OBJECTIVES[objective].example(data, i, T) for i in range(first, first + n)]
    return sample.collate(examples, data.tokenizer.pad_id)

# -----------------------------------------------------------------------------
# Optimizers. Those of torch.optim would do, but they import the compiler, which takes two seconds

GOOD = torch.tensor(1.0)  # the step may move the weights: see Optimizer.step

class Optimizer:
    """
    Weights in groups, each with its own weight decay. A subclass has new_state(p), which makes the
    list of tensors to keep and save for a weight, and update(lr, decay, good, weights, gradients,
    *state), where weights, gradients and each item of state are lists with one entry per weight. If
    good is 0, gradients may hold NaN, and neither weights nor state may change.
    """

    def __init__(self, groups, peak_lr):
        self.param_groups, self.peak_lr = groups, peak_lr
        self.state = {p: self.new_state(p) for group in groups for p in group['params']}

    @torch.no_grad()
    def step(self, rate=1.0, good=GOOD):
        """
        Move the weights. rate: the learning rate as a share of its peak. good: 1, or 0 for a step
        that moves nothing; a tensor on the device, so that the CPU need not wait for it.
        """
        for group in self.param_groups:
            weights = [p for p in group['params'] if p.grad is not None]
            if weights:
                self.update(self.peak_lr * rate, group['weight_decay'], good, weights,
                            [p.grad for p in weights], *zip(*(self.state[p] for p in weights)))

    def zero_grad(self):
        for p in self.state:
            p.grad = None

    def state_dict(self):
        return list(self.state.values())

    def load_state_dict(self, saved):
        for mine, old in zip(self.state.values(), saved, strict=True):
            if mine:  # an optimizer may keep nothing
                torch._foreach_copy_(mine, old)

class AdamW(Optimizer):
    """
    Adam (Kingma and Ba 2014, https://arxiv.org/abs/1412.6980) with the weight decay of Loshchilov
    and Hutter 2017, https://arxiv.org/abs/1711.05101. m and v are running means of the gradient g
    and of its square. They start at 0, so in step t they are divided by 1 - beta^t before use. (The
    decay is multiplied by lr, as in torch, not by the schedule alone, as in the paper.)

        m = beta1 * m + (1 - beta1) * g        v = beta2 * v + (1 - beta2) * g^2
        weight -= lr * (m / (sqrt(v) + 1e-8) + weight_decay * weight)
    """

    def __init__(self, groups, peak_lr, betas):
        super().__init__(groups, peak_lr)
        self.beta1, self.beta2 = betas

    def new_state(self, p):
        return [torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)]

    def update(self, lr, decay, good, weights, gradients, m, v, t):
        torch._foreach_add_(t, [good] * len(t))  # for a lone tensor the CPU would wait
        torch._fused_adamw_(weights, gradients, m, v, [], t, lr=lr, beta1=self.beta1,
                            beta2=self.beta2, weight_decay=decay, eps=1e-8, amsgrad=False,
                            maximize=False, found_inf=(1 - good).to(t[0].device))

def orthogonal(x):
    """
    x (n, rows, columns) -> nearly orthogonal matrices: U S V^T becomes about U V^T. Newton and
    Schulz's step x = 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x, taken five times, brings
    most singular values to between 0.7 and 1.2.
    """
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT                                                    # (n, rows, rows)
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # of gram and gram^2
        x = torch.baddbmm(x, poly, x, beta=3.4445)                         # 3.4445 x + poly x
    return x

class Muon(Optimizer):
    """
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: make the gradient (with momentum)
    orthogonal, so that a step is equally large in all directions; the plain gradient is large in a
    few. Matrices of one shape are computed together. bfloat16, if `dtype` is that, is good enough.
    m: the running mean of the gradient g; scale: sqrt(max(1, rows / columns)), as in their code.

        weight -= lr * (scale * orthogonal(momentum * m + (1 - momentum) * g) + decay * weight)
    """

    def __init__(self, groups, peak_lr, momentum, dtype):
        by_shape = {}
        for i, group in enumerate(groups):
            for p in group['params']:
                by_shape.setdefault((i, p.shape), {**group, 'params': []})['params'].append(p)
        super().__init__([*by_shape.values()], peak_lr)
        self.momentum = momentum
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32

    def new_state(self, p):
        return [torch.zeros_like(p)]

    def update(self, lr, decay, good, weights, gradients, means):
        m = torch.stack(means)                                             # (n, rows, columns)
        g = torch.stack(gradients).where(good > 0, m)                      # else m stays as it is
        m = m.lerp(g, 1 - self.momentum)
        torch._foreach_copy_(means, list(m))
        ahead = g.lerp(m, self.momentum)                                   # Nesterov's momentum
        steps = orthogonal(ahead.to(self.dtype)).float()
        scale = math.sqrt(max(1, steps.size(1) / steps.size(2)))
        torch._foreach_mul_(weights, 1 - lr * decay * good)
        torch._foreach_add_(weights, list(steps * (-lr * scale * good)))

def adamw(groups, s, dtype):
    return [AdamW(groups, s.learning_rate, (s.beta1, s.beta2))]

def muon(groups, s, dtype):
    """Muon for the group `matrices` of optimizer_groups, AdamW for the rest."""
    matrices = [group for group in groups if group['name'] == 'matrices']
    rest = [group for group in groups if group['name'] != 'matrices']
    return [Muon(matrices, s.muon_learning_rate, s.muon_momentum, dtype), *adamw(rest, s, dtype)]

OPTIMIZERS = {'adamw': adamw, 'muon': muon}  # (groups of weights, settings, dtype) -> optimizers

SCHEDULES = {'cosine': lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # from 1 to 0
             'linear': lambda done: 1 - done, 'constant': lambda done: 1.0}

def learning_rate(step, s):
    """Linear warm-up over warmup_iters; then, unless constant, down to min_lr at lr_decay_iters."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    low = s.learning_rate / 10 if s.min_lr is None else s.min_lr
    end = s.lr_decay_iters or s.max_iters
    done = min(1.0, (step - s.warmup_iters) / max(1, end - s.warmup_iters))
    return low + (s.learning_rate - low) * SCHEDULES[s.lr_schedule](done)

# -----------------------------------------------------------------------------
# Settings. Those of the architecture are in Config of model.py, which is kept with the weights.

@dataclass
class Settings:
    """The flags of training."""
    # what to train
    dataset: str = flag('pydoc', 'name of a folder in data/, or a folder of prepare_data.py')
    preset: str = flag('nano', 'row of PRESETS in model.py', PRESETS)
    init_from: str = flag('scratch', 'scratch | resume (from out_dir) | auto: resume if possible | '
                                     'a checkpoint, a Hugging Face folder or name')
    out_dir: str = flag('out', 'folder for ckpt.pt, best.pt, log.csv and config.toml')
    config: str = flag('', 'TOML file of flags; a flag on the command line counts more')
    eval_only: bool = flag(False, 'print the scores of the whole validation split, write nothing')
    dry_run: bool = flag(False, 'print what the run would cost, and end')
    objective: str = flag('', 'what is learned [what suits the preset and data]', OBJECTIVES)
    best_by: str = flag('', 'score of the task that chooses best.pt [accuracy, F1, else the loss]')
    # how much
    batch_size: int = flag(16, 'examples in a micro-batch', low=1)
    gradient_accumulation_steps: int = flag(1, 'micro-batches in a step, over all processes', low=1)
    max_iters: int = flag(800, 'steps')
    eval_interval: int = flag(100, 'steps between evaluations; each writes ckpt.pt', low=1)
    eval_iters: int = flag(20, 'batches in an evaluation', low=1)
    log_interval: int = flag(20, 'steps between lines of the log', low=1)
    sample_tokens: int = flag(60, 'tokens of the sample at each evaluation; 0: none')
    patience: int = flag(0, 'stop after so many evaluations without a better one; 0: never')
    target_loss: float = flag(0.0, 'stop when the validation split has this loss, for which each '
                              'evaluation takes all of it; 0: never')
    # how
    optimizer: str = flag('adamw', 'muon: Muon for matrices, AdamW for the rest', OPTIMIZERS)
    learning_rate: float = flag(2e-3, 'of AdamW, at its peak', above=0, high=1e6)
    muon_learning_rate: float = flag(0.02, 'of Muon, at its peak', above=0, high=1e6)
    muon_momentum: float = flag(0.95, 'of Muon: share of the old mean', below=1)
    min_lr: float = flag(None, 'learning rate at the end [learning_rate / 10]')
    warmup_iters: int = flag(50, 'steps over which the learning rate rises')
    lr_decay_iters: int = flag(None, 'step at which min_lr is reached [max_iters]', low=1)
    lr_schedule: str = flag('cosine', 'how the learning rate falls', SCHEDULES)
    weight_decay: float = flag(0.1, 'of matrices and embeddings', high=1e6)
    beta1: float = flag(0.9, 'AdamW: decay of the mean of the gradient', below=1)
    beta2: float = flag(0.99, 'AdamW: decay of the mean of the squared gradient', below=1)
    grad_clip: float = flag(1.0, 'limit of the norm of the whole gradient; 0: none')
    freeze: str = flag('', 'words in names of weights to freeze: trunk, or "tokens blocks.0."')
    adversarial: float = flag(0.0, 'also train on embeddings moved this far up their gradient')
    # where
    seed: int = flag(1337, 'of everything random')
    device: str = flag('auto', 'auto: cuda, else cpu', ('auto', 'cpu', 'cuda', 'mps'))
    dtype: str = flag('auto', 'of matrix products [16 bits where fast]; weights stay float32',
                      ('auto', 'float32', 'bfloat16', 'float16'))
    compile: bool = flag(None, 'torch.compile [on a GPU, for 1,000 steps or more of fixed shape]')

    __post_init__ = check_flags

# Good values where they differ from the defaults: by what is trained, then by preset ('': any).
MUON = dict(optimizer='muon', min_lr=0.0, warmup_iters=100, lr_schedule='linear')
TEXT_TO_TEXT = dict(MUON, max_iters=2000, batch_size=32, learning_rate=3e-3,
                    muon_learning_rate=0.01, eval_interval=250)
NEW_HEAD = dict(MUON, max_iters=1000, batch_size=32, muon_learning_rate=3e-3, dropout=0.1)

def large(**changes):
    """Rows for pre-trained models: few steps at low rates, for tasks above those of BERT's A.3."""
    usual = dict(max_iters=800, batch_size=32, learning_rate=1e-4, min_lr=0.0, lr_schedule='linear',
                 beta2=0.999, weight_decay=0.01, dropout=0.1)
    return dict.fromkeys(('gpt2-124m', 'bert-base', 't5-small', 'llama-7b'), usual | changes)

RECIPES = {
    'pretrain': {
        'lstm': dict(learning_rate=1e-2),
        'palm': dict(learning_rate=1e-2),  # its embeddings start large
        't5': TEXT_TO_TEXT,
        'gpt2-124m': dict(learning_rate=6e-4, warmup_iters=2000, max_iters=600_000, beta2=0.95,
                          batch_size=12, gradient_accumulation_steps=40, eval_interval=2000,
                          eval_iters=200),
        'nano': dict(MUON, max_iters=132, batch_size=24, eval_interval=66, eval_iters=5,
                     warmup_iters=0, learning_rate=3e-2, muon_learning_rate=0.09, weight_decay=0.03,
                     beta1=0.7, beta2=0.95, muon_momentum=0.75, grad_clip=0.0),
        # one token in seven has a target, so many steps; and a rate that post-norm survives
        'bert': dict(MUON, max_iters=2500, batch_size=64, learning_rate=6e-3,
                     muon_learning_rate=0.01, eval_interval=500, log_interval=100),
    },
    'classify': {'': dict(NEW_HEAD, dropout=0.3), **large()},
    'tag': {'': dict(NEW_HEAD, max_iters=1500), **large(max_iters=600, learning_rate=2e-4)},
    'qa': {'': NEW_HEAD, **large()},
    'seq2seq': {'': dict(TEXT_TO_TEXT, batch_size=64), **large(learning_rate=3e-4)},
}
RECIPES['more text'] = RECIPES['pretrain'] | large(max_iters=400, batch_size=8, learning_rate=3e-5)

# -----------------------------------------------------------------------------
# A step. `s`, a Settings (above), has the flags; `runtime`, a Runtime (below), knows the device,
# the precision and the other processes. A lone process has world_size 1, rank 0; sum(x) is x.

def micro_batches(step, s, runtime):
    """
    The share of this process in the examples of a step: the first example of each micro-batch, and
    how many examples each has: batch_size, or the largest number that divides both it and the share
    (then dropout draws other values than in one process).
    """
    total, world = s.gradient_accumulation_steps * s.batch_size, runtime.world_size
    require(total % world == 0, f"--gradient_accumulation_steps times --batch_size is {total}, "
            f"which cannot be shared by {world} processes: make it a multiple of {world}")
    share = total // world
    begin, n = step * total + runtime.rank * share, math.gcd(share, s.batch_size)
    return range(begin, begin + share, n), n

def fgm_perturbation(gradient, distance):
    """
    Fast gradient method: distance * g / |g|. By this much backward() moves the table of token
    embeddings up its gradient g, and then adds the gradient found there. (Miyato et al. 2017,
    https://arxiv.org/abs/1605.07725, move the embeddings of each example.)
    """
    return distance * gradient / gradient.norm().clamp(min=1e-12)

def backward(step, model, forward, data, s, runtime):
    """
    Leave in .grad the gradient of the mean loss over all targets of a step; returns that loss. All
    batches are made first, since the loss of each is divided by the number of targets in all of
    them, so that their gradients add up. forward: the model, or its compiled form.
    """
    firsts, n = micro_batches(step, s, runtime)
    batches = [get_batch(data, s.objective, model.config.block_size, first, n) for first in firsts]
    numbers = {}
    for kind in batches[0]:
        if kind.endswith('targets'):
            number = sum(int((batch[kind] != IGNORE_INDEX).sum()) for batch in batches)
            numbers[f'num_{kind}'] = max(1, int(runtime.sum(number)))

    def add_gradients():
        total = 0.0
        for first, batch in zip(firsts, batches):
            batch = {key: runtime.move(t) for key, t in batch.items()}
            seed = np.random.SeedSequence((s.seed, first)).generate_state(1)[0]
            torch.manual_seed(int(seed))  # of dropout
            with runtime.precision():
                _, loss = forward(**batch, **numbers)
            del _  # the logits, which may be the largest tensor, before gradients are made
            runtime.scaler.scale(loss * runtime.world_size).backward()     # adds to .grad
            total += loss.detach()
        runtime.average_gradients(model)  # of world_size * each gradient: their sum
        return total

    loss = add_gradients()
    if s.adversarial:
        weight = getattr(model, 'trunk', model).tokens.weight
        before = weight.data.clone()
        weight.data += fgm_perturbation(weight.grad, s.adversarial)
        add_gradients()
        weight.data.copy_(before)
    if runtime.world_size > 1:
        dist.all_reduce(loss)
    return loss

def optimizer_step(step, loss, model, optimizers, s, runtime):
    """
    Clip the gradient and move the weights. If the loss or the gradient is not finite, no weight
    moves and ValueError is raised; but an overflow in float16 only halves the scale of the loss.
    A check waits for the GPU, so on CUDA a bad step raises only if it is logged, else just moves
    nothing.
    """
    for optimizer in optimizers:
        runtime.scaler.unscale_(optimizer)  # before clipping, or the limit would mean another norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
    good = (loss + norm).isfinite().float()
    checked = runtime.device != 'cuda' or step % s.log_interval == 0
    if checked and not (loss.isfinite() and (norm.isfinite() or runtime.scaler.is_enabled())):
        raise ValueError(f"step {step}: the {'gradient' if loss.isfinite() else 'loss'} is not "
                         f"finite: resume from {s.out_dir}/ckpt.pt, or begin with best.pt, with a "
                         "lower --learning_rate, --muon_learning_rate or --adversarial")
    for optimizer in optimizers:
        optimizer.step(learning_rate(step, s) / s.learning_rate, good)
    for optimizer in optimizers:  # when all have moved: those of a fork may share a weight
        optimizer.zero_grad()
    runtime.scaler.update()

# -----------------------------------------------------------------------------
# Evaluation

def evaluate(model, data, s, runtime, limit=None):
    """
    Returns {name: score}:

        labelled data of val      the scores of the task over all rows; for seq2seq only if one of
                                  them chooses best.pt, or limit is None
        else, or if these have    loss and accuracy of `limit` examples (None: all); for a whole
        no loss                   text, text_scores in place of accuracy
    """
    scores, T, example = {}, model.config.block_size, OBJECTIVES[s.objective].example
    writes = limit is None or s.best_by in sample.TARGET_SCORES            # generating is slow
    with runtime.precision(), sample.evaluating(model):
        if data.split == 'val' and data.task and (writes or data.task != 'seq2seq'):
            # in each process: the rows are few, and F1 or BLEU cannot be added up
            scores = sample.task_scores(model, data.tokenizer, data.rows, data.task, data.labels)
        if 'loss' in scores:
            return scores
        n = len(data.rows) or data.windows(T)
        chosen = np.linspace(0, n - 1, min(n, limit or n), dtype=int)
        examples = [example(data, i, T) for i in chosen[runtime.rank::runtime.world_size]]
        _, totals = sample.predict(model, examples, data.tokenizer.pad_id)
    scores['loss'] = 0.0
    for kind in sorted(example(data, 0, T), key=len):  # `targets` before `next_targets`
        if kind.endswith('targets'):  # zeros: this process may have had no example
            nats, count, right = runtime.sum(totals.get(kind, np.zeros(3)))
            # a whole text
            if kind == 'targets' and 'rows' not in data.counts and count == len(data.tokens) - 1:
                scores |= sample.text_scores(nats, count, data.counts)
            elif count:
                scores['loss'] += nats / count
                scores.setdefault(kind.replace('targets', 'accuracy'), right / count)
    return scores

def print_sample(model, tokenizer, s, runtime):
    """What the model would write now, to watch it learn."""
    settings = sample.Settings(max_new_tokens=s.sample_tokens, seed=s.seed)
    with sample.evaluating(model):
        [[text]] = sample.write_batch(model, tokenizer, [[tokenizer.start_id]], [], [0], settings)
    for line in filter(str.strip, text.text.splitlines()):
        runtime.print0(f'    | {line}')

# -----------------------------------------------------------------------------
# The loop

@dataclass
class Progress:
    """How far a run has come; saved in its checkpoints."""
    step: int = 0
    due: bool = False    # evaluate before this step, also after a resume
    seconds: float = 0.0
    best: tuple = (-math.inf, -math.inf)  # of the best evaluation: score (or -loss) and -loss
    best_step: int = 0
    evals_since_best: int = 0

class Trainer:
    """
    A run. at: its Progress; log: a row per evaluation. checkpoint: that of a run to resume. The
    folder s.out_dir must exist.
    """

    def __init__(self, model, data, val, s, runtime, checkpoint=None):
        self.data, self.val, self.s, self.runtime = data, val, s, runtime
        self.model = self.forward = model.to(runtime.device).train()
        self.optimizers = OPTIMIZERS[s.optimizer](optimizer_groups(model, s.weight_decay), s,
                                                  runtime.dtype)
        self.at, self.log, self.signal = Progress(), [], 0
        if checkpoint:
            with reading(s.out_dir, "its ckpt.pt is of another version, start a new run"):
                # at.step also says which examples come next
                self.at, self.log = Progress(**checkpoint['progress']), checkpoint['log']
                for optimizer, saved in zip(self.optimizers, checkpoint['optimizer'], strict=True):
                    optimizer.load_state_dict(saved)
                if checkpoint['scaler']:  # it was float16
                    runtime.scaler.load_state_dict(checkpoint['scaler'])
            # ckpt.pt was copied alone? Of several machines only the first writes best.pt.
            if not runtime.sum(runtime.is_main and Path(s.out_dir, 'best.pt').exists()):
                self.at.best = Progress.best
        self.tokens = tokens_per_step(s, data, model.config)
        self.best_by = s.best_by or sample.BEST_SCORES.get(data.task, ['loss'])[0]
        self.sign = -1 if self.best_by in sample.LOWER_IS_BETTER else 1
        self.started = time.perf_counter() - self.at.seconds
        fixed = not OBJECTIVES[s.objective].by_rows                        # all of one shape
        pays = runtime.device == 'cuda' and fixed and s.max_iters >= 1000
        if s.compile or (s.compile is None and pays):
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
            # without the logits, which would get a gradient of zeros, as large as they are
            self.forward = torch.compile(lambda **batch: (None, model(**batch)[1]))

    def catch(self, number, frame):
        """Note a signal. A second ends at once, except where two are usual: SIGHUP, torchrun."""
        self.signal, alone = number, self.runtime.world_size == 1
        on_signal(signal.SIG_DFL if alone else signal.SIG_IGN)
        with contextlib.suppress(OSError, RuntimeError):  # the signal came while a line is written
            progress('')
            to_stderr(f"saving after this step{'; once more to end at once' * alone}")

    def save(self, name, **extra):
        self.at.seconds, data = time.perf_counter() - self.started, self.data
        if self.runtime.is_main:
            save(Path(self.s.out_dir, name), self.model, tokenizer=data.tokenizer.to_dict(),
                 data=data.fingerprint, task=data.task, labels=data.labels, settings=asdict(self.s),
                 block_size=data.block_size, progress=asdict(self.at), log=self.log, **extra)

    def evaluate(self):
        """Evaluate; write log.csv, best.pt at a new best or target. Returns why to stop, or ''."""
        s, at, runtime, reason = self.s, self.at, self.runtime, ''
        limit = s.eval_iters * s.batch_size
        train_loss = evaluate(self.model, self.data, s, runtime, limit)['loss']
        if s.target_loss:
            limit = math.inf  # all of it, but text to text is not written, as without a limit
        scores = evaluate(self.model, self.val, s, runtime, limit)
        runtime.print0(f"step {at.step}: train loss {train_loss:.4f}, val "
                       f"{sample.format_scores(scores)}")
        if s.target_loss and scores['loss'] <= s.target_loss:
            reason = (f"target loss {s.target_loss} reached after {at.seconds:.1f} seconds, at "
                      f"step {at.step}: {sample.format_scores(scores)} over the whole split")
        loss = float(scores['loss'])
        found = (self.sign * float(scores[self.best_by]), -loss)           # ties: the lower loss
        at.evals_since_best += 1
        if found > at.best or (reason and self.best_by != 'loss'):         # reason: the target
            at.best, at.best_step, at.evals_since_best = found, at.step, 0
            self.save('best.pt')
        elif not reason and 0 < s.patience <= at.evals_since_best:
            reason = f"stopped at step {at.step}: the last {s.patience} evaluations were no better"
        self.log.append([at.step, train_loss, loss, learning_rate(at.step, s),
                         at.step * self.tokens, at.seconds])
        if runtime.is_main:
            with contextlib.suppress(OSError):  # open in Excel: the next one writes all rows
                write_file(Path(s.out_dir, 'log.csv'), lambda f: np.savetxt(
                    f, self.log, '%.10g', ',', comments='',
                    header='step,train_loss,val_loss,lr,tokens,seconds'))
            if s.sample_tokens and not self.data.task and self.model.config.arch in ('gpt', 'lstm'):
                print_sample(self.model, self.data.tokenizer, s, runtime)
        return reason

    def mfu(self, seconds):
        """', MFU 41%': model FLOPs utilization of a step of so many seconds, if a card is known."""
        name = torch.cuda.get_device_name() if self.runtime.device == 'cuda' else ''
        peak = self.runtime.world_size * sum(PEAKS[card] for card in PEAKS if card in name)
        flops = flops_per_token(self.model) * self.tokens / seconds
        return f', MFU {flops / peak:.0%}' if peak else ''

    def run(self):
        """Train until there is a reason to stop. Returns the exit status: 0, or 128 + signal."""
        s, at, runtime, reason, n = self.s, self.at, self.runtime, '', 0
        on_signal(self.catch)
        while True:
            at.due = at.due or at.step % s.eval_interval == 0 or at.step == s.max_iters
            stopped = runtime.sum(self.signal)
            if at.due or stopped:
                self.save('ckpt.pt', optimizer=[o.state_dict() for o in self.optimizers],
                          scaler=runtime.scaler.state_dict())
            if stopped:
                reason = f"stopped at step {at.step}: go on with --init_from resume"
            elif at.due:
                reason = self.evaluate()
            if reason or at.step >= s.max_iters:
                break

            progress(f"step {at.step} of {s.max_iters}")
            if at.due or not n:  # n: steps since an evaluation or a line of the log
                began, n = time.perf_counter(), 0
            loss = backward(at.step, self.model, self.forward, self.data, s, runtime)
            optimizer_step(at.step, loss, self.model, self.optimizers, s, runtime)
            n += 1
            if at.step % s.log_interval == 0:
                value = loss.item()                                        # waits for the device
                mean, n = (time.perf_counter() - began) / n, 0
                runtime.print0(
                    f"iter {at.step}: loss {value:.4f}, lr {learning_rate(at.step, s):.2e}, "
                    f"{self.tokens / mean:,.0f} tok/s{self.mfu(mean)}, "
                    f"ETA {duration((s.max_iters - at.step - 1) * mean)}")
            at.step, at.due = at.step + 1, False
        if s.target_loss and not reason:
            reason = f"target loss {s.target_loss} not reached"
        runtime.print0(f"{reason or 'done'}: {at.step} steps in {duration(at.seconds)}, best "
                       f"validation {self.best_by} {self.sign * at.best[0]:.4f} at step "
                       f"{at.best_step}. Ask the model: python sample.py --out_dir "
                       f"{shell_word(s.out_dir)} --start \"...\"")
        if runtime.is_main and len(self.log) > 2:  # two points are no picture
            plot(self.log, Path(s.out_dir, 'loss.png'))
        return 128 + self.signal if self.signal else 0

def stops():
    return STOPS if threading.current_thread() is threading.main_thread() else []  # gets signals

def on_signal(handler):
    """Let `handler` take Ctrl-C, SIGTERM and SIGHUP, except where nohup ignores them."""
    for number in stops():
        if number.name == 'SIGHUP' and handler == signal.SIG_DFL:
            continue  # a closed terminal may send SIGHUP twice: the run is saved all the same
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

def plot(log, path):
    """The losses as a picture, where matplotlib is installed."""
    with contextlib.suppress(Exception):  # the run counts, not its picture
        from matplotlib.figure import Figure
        rows, axes = np.array(log), Figure().subplots()
        axes.plot(rows[:, 0], rows[:, 1:3], label=['train loss', 'val loss'])
        axes.set(xlabel='step', ylabel='nats per token')
        axes.legend()
        axes.figure.savefig(path)

# -----------------------------------------------------------------------------
# Runtime: device, precision, processes

def keep_memory():
    """
    glibc returns large blocks to the system as soon as they are free, and every step gets its
    activations anew, page by page. If they are kept, the quick start trains 1.8 times as fast.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)            # M_MMAP_MAX: take blocks from the heap, however large
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: and never shrink it

class Runtime:
    """Where and how a run computes: its device and precision, and which of several processes."""

    def __init__(self, s):
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0)) % self.world_size       # it may be set alone
        self.is_main = self.rank == 0
        self.device = sample.find_device(s.device)
        if self.world_size > 1:
            if self.device == 'cuda':
                torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))  # what `cuda` means
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device == 'cuda' else 'gloo')
        if self.device == 'cpu':
            keep_memory()
        # Warnings to ignore: that the next call is an old one, that autocast on mps has no float32
        # (even if it is off), that RMSNorm in 16 bits is slow with float32 weights (--qk_norm).
        warnings.filterwarnings('ignore', '.*to control TF32|In MPS autocast|Mismatch dtype')
        tf32 = self.device == 'cuda' and s.dtype != 'float32'  # where autocast leaves float32
        torch.set_float32_matmul_precision('high' if tf32 else 'highest')
        self.dtype = self.best_dtype() if s.dtype == 'auto' else getattr(torch, s.dtype)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)

    def best_dtype(self):
        """bfloat16 where the hardware multiplies in it; float16 on older GPUs; else float32."""
        if self.device == 'cuda':
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        # With AVX512-BF16 a step takes half of the time of float32 at 4 x 128, a third at 6 x 384.
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

    def precision(self):
        """Inside, products are in self.dtype; an LSTM, the residual stream and the loss are not."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def move(self, t):
        """Copy a tensor from the CPU to the device. On CUDA it is queued: the CPU does not wait."""
        if self.device == 'cuda':
            return t.pin_memory().to(self.device, non_blocking=True)
        return t.to(self.device)  # mps copies wrong numbers if it need not wait: pytorch#189690

    def sum(self, values):
        """Add a number or an array over all processes, on the CPU, so that none waits for a GPU."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def average_gradients(self, model):
        """Average over processes, as one vector; what was averaged before (--adversarial) stays."""
        if self.world_size > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            mean = parameters_to_vector(gradients) / self.world_size
            dist.all_reduce(mean)                                          # a sum
            vector_to_parameters(mean, gradients)

    def print0(self, text):
        """Print in the main process. If the output is closed, the run goes on without it."""
        if self.is_main:
            progress('')
            try:
                print(text, flush=True)
            except OSError:
                prepare_data.mute_stdout()

# -----------------------------------------------------------------------------
# What a run costs

# FLOP/s that the makers of cards promise for dense bfloat16 products
PEAKS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L40S': 362e12, 'RTX 4090': 165e12}

def tokens_per_step(s, data, config):
    """Tokens in a step; for labelled data, whose rows have many lengths, the mean."""
    mean = data.lengths.mean() if data.rows else config.block_size
    return round(s.batch_size * s.gradient_accumulation_steps * mean)

def duration(seconds):
    return datetime.timedelta(seconds=round(seconds))

def flops_per_token(model):
    """
    Of training: 6 per parameter, 2 forward and 4 backward (Kaplan et al. 2020,
    https://arxiv.org/abs/2001.08361), but 0 for token tables that multiply nothing; for attention
    12 n_layer C T, as if no key were hidden and H D = C (Chowdhery et al. 2022, appendix B). This
    is too much if a token uses only some weights (one of two stacks; BERT's output: one token in
    seven), or if weights are frozen (2 each, below the first weight that is trained).
    """
    c = model.config
    not_multiplied = ((not c.tied) + bool(c.task)) * c.vocab_size * c.n_embd
    attention = 0 if c.arch == 'lstm' else 12 * c.n_layer * c.n_embd * c.block_size
    return 6 * (num_parameters(model) - not_multiplied) + attention

def dry_run(model, s, data, runtime):
    """
    Estimate what a run needs before it is spent. Memory: 0.4 GB for Python and torch; 16 bytes a
    parameter for weights, gradients and two moments (Muon has one); activations by equation 1 of
    Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198; the logits with their gradients. This
    is too much for BERT, encoder-decoders, models with a head, and frozen weights (4 bytes each).
    """
    from torch.utils.benchmark import Timer  # slow to import
    config = model.config
    T, C, V = config.block_size, config.n_embd, config.vocab_size
    blocks = config.n_layer * (2 if config.arch == 'encdec' else 1)        # of all stacks
    parts = [f"{group['name']} {sum(p.numel() for p in group['params']):,}"
             for group in optimizer_groups(model, s.weight_decay)]         # of what is trained
    n, tokens = num_parameters(model), tokens_per_step(s, data, config)
    flops = flops_per_token(model) * (2 if s.adversarial else 1)
    width = runtime.dtype.itemsize // 2                                    # times 16 bits
    # equation 1 counts T x S weights, which attention() stores only if it uses the formula
    fused = runtime.device == 'cuda' or T > 512 or (width == 2 and not config.dropout)
    scores = 0 if fused else 5 * config.n_head * T
    activations = s.batch_size * T * (width * blocks * (34 * C + scores) + 12 * V)
    x = torch.randn(2048, 4 * C, dtype=runtime.dtype, device=runtime.device)
    timer = Timer('x.T @ x', globals={'x': x}, num_threads=torch.get_num_threads())
    speed = 2048 * (4 * C) ** 2 / timer.timeit(10).mean                    # half of what it reaches
    total = tokens * s.max_iters
    runtime.print0(
        f"parameters {n:,}: {', '.join(parts)}\n"
        f"tokens     {tokens:,} a step, {total / 1e6:,.1f} M in {s.max_iters:,} steps: "
        f"{total / data.counts['tokens']:,.1f} times the data, {total / n:,.1f} a parameter (for a "
        "GPT on new text about 20 make the best of compute: Hoffmann et al. 2022)\n"
        f"compute    {flops / 1e6:,.1f} MFLOPs a token, {flops * total / 1e12:,.1f} TFLOPs in all\n"
        f"memory     about {(0.4e9 + 16 * n + activations) / 1e9:,.2f} GB: weights, gradients and "
        f"moments {16 * n / 1e9:,.3f}, activations {activations / 1e9:,.3f}\n"
        f"time       {duration(flops * total / speed / runtime.world_size)} at "
        f"{speed / 1e9:,.0f} GFLOP/s, half of what a large product reaches")

# -----------------------------------------------------------------------------
# The script: from flags to a model, its settings and its data

def find_dataset(name, runtime):
    """The folder of a data set. pydoc, the default, is made where it is missing."""
    folder = Path(name)
    if not Path(folder, 'meta.json').exists():
        folder = Path('data', name.removeprefix('data/'))
    meta = folder / 'meta.json'
    if name == 'pydoc' and runtime.is_main and not meta.exists():
        runtime.print0("preparing data/pydoc, the documentation of this Python")
        prepare_data.prepare(prepare_data.Settings(dataset=name))
    runtime.sum(0)  # the others wait
    known = name in prepare_data.DATASETS
    flags = f'--dataset {name}' if known else f'--input FILE --out_dir {shell_word(str(folder))}'
    require(meta.exists(), f"--dataset {name}: there is no {meta}: make it with python "
            f"prepare_data.py {flags}")
    return folder

def make(cls, values):
    """A dataclass of flags, from those values that it has fields for."""
    return cls(**pick(values, *cls.__dataclass_fields__))

def new_model(s, values, data, runtime):
    """A model with random weights, of the preset and the flags."""
    preset = PRESETS[s.preset]
    width = preset.mlp_dim * values.get('n_embd', preset.n_embd) // preset.n_embd  # in proportion
    vocab_size = data.vocab_size
    if runtime.device == 'cuda':  # a multiple of 64 makes its products faster
        vocab_size += -vocab_size % 64
    config = make(Config, asdict(preset) | {'vocab_size': vocab_size, 'mlp_dim': width} | values)
    if 'window' not in values:  # with fewer blocks the last ones stay: they see most
        config.window = ' '.join(config.window.split()[-config.n_layer:])
    with torch.device('meta' if s.dry_run else 'cpu'):  # meta: shapes without memory
        return build(config)

def adapt_model(model, checkpoint, path, data, runtime):
    """Keep the trunk, add rows for special tokens that it lacks, replace a head of another task."""
    for kind in ('dropped', 'new'):
        if checkpoint.get(kind):
            runtime.print0(f"{path}: {kind}: {', '.join(checkpoint[kind])}")
    added = data.vocab_size - model.config.vocab_size
    if checkpoint and data.rows and added > 0:
        runtime.print0(f"{path}: {added} rows added to its vocabulary, for special tokens")
        model = resize(model, path, vocab_size=data.vocab_size)
    trunk = getattr(model, 'trunk', model)
    if data.task not in HEADS:
        return trunk
    if (model.config.task, checkpoint.get('labels')) != (data.task, data.labels):
        runtime.print0(f"new: a head for {data.task}, of {len(data.labels)} labels: "
                       f"{prepare_data.some_of(data.labels)}")
        model = TaskModel(replace(trunk.config, task=data.task, n_labels=len(data.labels),
                                  label_smoothing=0.0), trunk)
    return model

def sort_head(model, checkpoint, data):
    """
    A head from elsewhere may have the labels in another order: put its rows in the order of the
    data. A qa head has two outputs, whether or not the data have questions without an answer.
    """
    labels = checkpoint.get('labels', [])
    if data.task == 'qa':
        checkpoint['labels'] = data.labels
    elif labels != data.labels and sorted(labels) == sorted(data.labels):
        for p in model.head.parameters():
            p.data = p.data[[labels.index(label) for label in data.labels]]
        checkpoint['labels'] = data.labels

def freeze(model, s):
    """
    Do not train weights with a word of --freeze in their names: `trunk` is all but the head, which
    becomes a logistic regression on features; `tokens embed blocks.0.` are the first layers.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(not any(word in name for word in s.freeze.replace(',', ' ').split()))
    require(not s.freeze or len({p.requires_grad for p in model.parameters()}) == 2,
            f"--freeze {s.freeze}: all of the weights have such names, or none")
    require(not s.adversarial or getattr(model, 'trunk', model).tokens.weight.requires_grad,
            f"--adversarial moves the embedding, which --freeze {s.freeze} keeps: leave one out")

def find_objective(s, arch, task):
    """The objective of the flags, else the first that fits the model and the data ('': text)."""
    fitting = [name for name, objective in OBJECTIVES.items()
               if arch in objective.archs and task in objective.tasks]
    chosen = s.objective or next(iter(fitting), '(none given)')
    require(chosen in fitting, f"--objective {chosen}: a {arch} learns {task or 'text'} by "
            f"{' or '.join(fitting) or 'none of them'}: choose another --objective or --preset")
    return chosen

# Settings that a resumed run must keep: weights, examples or best.pt depend on them.
FIXED = ('block_size', 'optimizer', 'freeze', 'batch_size', 'gradient_accumulation_steps', 'seed',
         'objective', 'best_by')

def check(given, s, config, data, val, checkpoint, path, resume):
    """Before anything is written, refuse what would fail later. checkpoint: of `path`, or {}."""
    folder, T, objective = data.folder, config.block_size, OBJECTIVES[s.objective]
    old, old_labels = checkpoint.get('settings', {}), checkpoint.get('labels', [])
    # Can the objective learn from the data?
    require(T >= objective.shortest,
            f"--block_size {T}: {s.objective} needs at least {objective.shortest}")
    for split in (data, val):
        # raises where there is no window, or no special token that the objective needs
        example = objective.example(split, 0, T)
        require('targets' in ''.join(example), f"{s.objective}: its examples have no targets")
        if split.rows:
            # a decoder alone reads source and target joined, with one [SEP] for two ends
            joined = data.task == 'seq2seq' and config.arch in ('gpt', 'lstm')
            longest = max(split.lengths) - 1 if joined else split.longest
            require(longest <= T, f"{folder} has an example of {longest} tokens, more than "
                    f"block_size={T}: raise --block_size, or prepare the data with a lower one")
        else:
            split.windows(T)
    scores = {'', 'loss', *sample.BEST_SCORES.get(data.task, [])}
    require(s.best_by in scores, f"--best_by {s.best_by}: {data.task or 'text'} has no such score: "
            f"choose one of {', '.join(sorted(scores)[1:])}")
    # Do the checkpoint and its model suit the data?
    run = Path(path or '')
    theirs = os.path.abspath(checkpoint.get('folder', run.parent if run.is_file() else run))
    require(checkpoint.get('tokenizer') in (None, data.tokenizer.to_dict()),
            f"{folder} was encoded with another tokenizer than {path}: prepare it with "
            f"--tokenizer {shell_word(theirs)}")
    # The last `example` is of val. Only a BERT may lack weights, such as those that guess masks.
    kind = 'masks and pairs' if 'next_targets' in example else config.task or 'masks'
    lacking = sample.lacking(checkpoint, kind)
    require(not (s.eval_only and lacking), f"{path} lacks weights, which would be random "
            f"({', '.join(lacking)}): train it first")
    require(not resume or ('optimizer' in checkpoint and checkpoint['data'] == data.fingerprint),
            f"{path} has no optimizer, or learned from other data than {folder} has now: start a "
            f"new run with --init_from {path}")
    head = data.task if data.task in HEADS else ''
    require(not s.eval_only or (config.task, old_labels) == (head, data.labels),
            f"{folder} is for {data.task or 'text'} with the labels {data.labels[:10]}, {path} for "
            f"{config.task or 'text'} with {old_labels[:10]}")
    # the vocabulary of others may end before that of their tokenizer
    require((data.highest if path else data.vocab_size - 1) < config.vocab_size,
            f"{folder} has {data.vocab_size} tokens, more than vocab_size={config.vocab_size}")
    # Do the flags contradict each other, or what cannot change any more?
    ends = (s.lr_decay_iters or s.max_iters) < s.max_iters and s.lr_schedule != 'constant'
    require(s.eval_only or not ends or s.min_lr != 0, f"--lr_decay_iters {s.lr_decay_iters}: from "
            f"there to --max_iters {s.max_iters} nothing is learned at --min_lr 0: raise one")
    fixed = asdict(config) | pick(old, 'preset')
    if resume:
        fixed |= pick(checkpoint['config'] | old, *FIXED)
    for name, value in given.items():
        require(hasattr(s, name) or hasattr(config, name),
                f"--{name} belongs to no flag: see --help")
        require(s.optimizer == 'muon' or s.config or not name.startswith('muon'),
                f"--{name}: only --optimizer muon reads it: leave it out, or choose that one")
        has = fixed.get(name, value)
        require(value == has, f"--{name} {value}: {path or folder} has {has!r}: leave the flag out")

def start(given):
    """
    Flags (read_flags adds those of a --config) -> (model, settings, train data, val data,
    checkpoint of a run that goes on, runtime).
    Settings override each other in this order, the last wins: defaults, recipe, checkpoint, flags.
    A checkpoint that is resumed or scored gives all of its settings, others only preset and data
    set. So s is made three times, of more each time: flags; checkpoint; recipe and objective.
    """
    s, model, checkpoint = make(Settings, given), None, {}
    path, latest = s.init_from, Path(s.out_dir, 'ckpt.pt')
    resume = path == 'resume' or (path == 'auto' and latest.exists() and not s.eval_only)
    if resume:
        path = latest
        if not path.exists():
            raise FileNotFoundError(f"--init_from resume: there is no {path}: leave the flag "
                                    f"out, or begin with its best.pt by --init_from {s.out_dir}")
    elif path in ('scratch', 'auto'):
        path = s.out_dir if s.eval_only else None                          # None: random weights
    torch.manual_seed(s.seed)  # of the weights that are new
    if path is not None:
        model, checkpoint, _ = sample.open_model(path)
    # The data: the flags or the checkpoint name it.
    is_new = not (resume or s.eval_only)
    values = checkpoint.get('settings', {})
    if is_new:
        values = pick(values, 'preset', 'dataset')
    values = values | {'out_dir': s.out_dir} | given
    s = make(Settings, values)
    runtime = Runtime(s)
    require(runtime.sum(resume) in (0, runtime.world_size),
            f"{latest} is not on all machines: copy it to each")
    folder = find_dataset(s.dataset, runtime)
    data, val = (Data(folder, split, s.seed) for split in SPLITS)
    if s.objective and '' in OBJECTIVES[s.objective].tasks:  # learn labelled data as text
        data.task = val.task = ''
        data.labels = val.labels = []
    # The model, and the recipe for what it learns.
    sort_head(model, checkpoint, data)
    if is_new:
        kind = data.task or ('more text' if path else 'pretrain')
        recipes = RECIPES.get(kind, RECIPES['classify'])
        values = recipes.get('', {}) | recipes.get(s.preset, {}) | values
        model = model or new_model(s, values, data, runtime)
        model = adapt_model(model, checkpoint, path, data, runtime)
    model = resize(model, path, **pick(values, *Config.may_change))
    # The objective, and the data as it reads them.
    objective = find_objective(s, model.config.arch, data.task)
    by_rows = OBJECTIVES[objective].by_rows
    s = make(Settings, values | {'objective': objective})
    data.batch_size = s.batch_size * s.gradient_accumulation_steps
    for split in (data, val):
        split.is_text[model.config.vocab_size:] = False  # a tokenizer may have more than the model
        if not by_rows:
            split.rows = []
    # cuDNN plans 30 ms for each new shape and gives a mask no gradient: use it if neither occurs
    plain = (not by_rows and model.config.window == '0'
             and model.config.positions in ('learned', 'rotary'))          # others may learn a bias
    torch.backends.cuda.enable_cudnn_sdp(plain)
    check(given, s, model.config, data, val, checkpoint, path, resume)
    if not s.eval_only:
        micro_batches(0, s, runtime)  # raises where the processes cannot share a step
    freeze(model, s)
    return model, s, data, val, checkpoint if resume else None, runtime

def lock(folder):
    """Lock a folder until the returned file is closed. ValueError if another process did so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / '.lock'
    f = path.open('a')  # closed with its process, however that ends
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out_dir {folder} is in use by process {path.read_text()}: choose "
                         "another folder, or wait") from None
    except (ImportError, OSError):  # Windows, or a drive without locks
        pass
    path.write_text(str(os.getpid()))
    return f

def claim_folder(folder, flags, resumed, runtime):
    """For a new run: rename the files of an earlier one, and write all flags to config.toml."""
    files = [folder / name for name in ('ckpt.pt', 'best.pt', 'log.csv', 'loss.png', 'config.toml')]
    renamed, n = files, 0
    while any(map(Path.exists, renamed)):  # one number for all files of a run
        renamed, n = [path.with_stem(f"{path.stem}.old{n or ''}") for path in files], n + 1
    for old, new in zip(files, renamed):
        for half in folder.glob(f'{old.name}.*.tmp'):  # of a run that was killed while it saved
            half.unlink()
        if old.exists() and not resumed:
            old.replace(new)
            runtime.print0(f"{old} is of an earlier run: moved to {new}")
    if not resumed:
        head = '# All choices of one preset: for another, begin without this file.\n'
        text = (head + write_config(flags)).encode(errors='replace')  # of a name that is not UTF-8
        write_file(folder / 'config.toml', lambda f: f.write(text))

def main(argv):
    groups = {"training (in brackets: the defaults; RECIPES has others for most presets)": Settings,
              "architecture (in brackets: that of gpt2; for the others see PRESETS)": Config}
    given = read_flags(argv, __doc__, groups)
    model, s, data, val, checkpoint, runtime = start(given)
    world, status = runtime.world_size, 0
    if s.dry_run:
        dry_run(model, s, data, runtime)
    elif s.eval_only:
        scores = evaluate(model.to(runtime.device), val, s, runtime)
        if runtime.is_main:
            print(f'val {sample.format_scores(scores)}')
    else:
        with contextlib.ExitStack() as after:  # in a notebook other runs and Ctrl-C may follow
            for number in stops():
                after.callback(signal.signal, number, signal.getsignal(number))
            if runtime.is_main:
                derived = 'objective', 'task', 'n_labels', 'vocab_size'    # from the data
                flags = asdict(s) | asdict(model.config) | {k: given.get(k) for k in derived}
                after.enter_context(lock(Path(s.out_dir)))
                claim_folder(Path(s.out_dir), flags, checkpoint, runtime)
            frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            runtime.print0(
                f"{s.preset}: {num_parameters(model):,} parameters"
                f"{f' ({frozen:,} frozen)' * bool(frozen)}, {str(runtime.dtype)[6:]} on "
                f"{runtime.device}{f', {world} processes' * (world > 1)}; {data.folder}: "
                f"{data.counts['tokens']:,} tokens, vocabulary of {data.vocab_size:,}")
            for split in (data, val):
                if s.objective == 'masked_lm' and not split.rows and not split.has_pairs:
                    runtime.print0(f"{data.folder} has no two documents in {split.split} with "
                                   "sentences that follow each other: no next sentence prediction "
                                   "in that loss")
            status = Trainer(model, data, val, s, runtime, checkpoint).run()
    if world > 1:
        dist.destroy_process_group()
    sys.exit(status)

if __name__ == '__main__':
    run(main)
