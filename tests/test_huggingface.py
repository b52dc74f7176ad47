"""
What model.py promises of other people's weights: a Hugging Face folder and nanoGPT's checkpoint open, and compute what they
computed there; what was trained here goes out again, and transformers opens it. Nothing is lost on the way without being
named, and a folder that is broken says where.

The judge is transformers itself, on tiny models whose weights are all random and wide (`awake`): as freshly made, biases
would be 0 and norms 1, and half of the mistakes would not show. The ids b3 to b16 name bugs that really happened.
"""

import dataclasses
import json
import os
import re
import sys

os.environ |= {'TRANSFORMERS_VERBOSITY': 'error', 'HF_HUB_OFFLINE': '1'}  # read when transformers is imported

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import model as model_py
from model import FAMILIES, IGNORE, PRESETS, Config, build, config_from, export_huggingface, load, optimizer_groups
from sample import generate

transformers.utils.logging.disable_progress_bar()

V, T = 61, 24  # vocabulary and block_size of the tiny models
LABELS = ['好评', '🙂', 'cafe\u0301', *(f'L{i}' for i in range(3, 11)), '']  # more than ten: '10' must not stand before '2'
NAMES = {  # the class whose folder is meant where a test says only which family, and the least that makes it tiny
    'gpt2': ('GPT2LMHeadModel', dict(vocab_size=V, n_positions=T, n_embd=12, n_layer=2, n_head=2)),
    'bert': ('BertForPreTraining', dict(vocab_size=V, max_position_embeddings=T, hidden_size=12, num_hidden_layers=2,
                                        num_attention_heads=2, intermediate_size=20)),
    't5': ('T5ForConditionalGeneration', dict(vocab_size=V, n_positions=T, d_model=12, d_kv=5, d_ff=20, num_layers=2,
                                              num_heads=2, decoder_start_token_id=0, eos_token_id=None)),
    'llama': ('LlamaForCausalLM', dict(vocab_size=V, max_position_embeddings=T, hidden_size=24, intermediate_size=20,
                                       num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)),
    'mistral': ('MistralForCausalLM', dict(vocab_size=V, max_position_embeddings=T, hidden_size=24, intermediate_size=20,
                                           num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                                           sliding_window=5)),
}
every_family = pytest.mark.parametrize('kind', NAMES)
every_decoder = pytest.mark.parametrize('kind', ['gpt2', 'llama', 'mistral'])


def awake(model):
    """All weights random and wide. Returns the model, with dropout off."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.5 if p.dim() < 2 else 0.0, 0.3)
    return model.eval()


def theirs(kind, name=None, **choices):
    """A tiny model of transformers."""
    name, sizes = name or NAMES[kind][0], NAMES[kind][1]
    cls = getattr(transformers, name)
    return awake(cls(cls.config_class(**{**sizes, 'bos_token_id': None, 'eos_token_id': None, **choices})))


def some(*shape, below=V):
    return torch.randint(below, shape)


def padded(lengths, left):
    """keep (B, T): rows of these lengths, padding on one side of them."""
    at = torch.arange(max(lengths))
    return torch.stack([at >= len(at) - n if left else at < n for n in lengths])


def close(ours, others, keep=slice(None)):
    ours, others = ours[keep], others[keep]
    assert ours.shape == others.shape, f'{tuple(ours.shape)} here, {tuple(others.shape)} there'
    difference = (ours - others).abs().max().item()
    assert difference <= 1e-4, f'differ by {difference:.2e}, of values up to {others.abs().max():.2f}'


def same_weights(a, b, but=()):
    """The same parameters bit for bit, under the same names."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert list(a) == list(b)
    assert not [name for name in a if name not in but and not torch.equal(a[name], b[name])]


def write(folder, about, tensors, name='model.safetensors'):
    """A folder as the hub has it. Returns its path."""
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(about, f)
    path = os.path.join(folder, name)
    if name.endswith('.bin'):
        torch.save(tensors, path)
    else:
        save_file({key: t.clone().contiguous() for key, t in tensors.items()}, path)
    return folder


def read(folder):
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        return json.load(f), load_file(os.path.join(folder, 'model.safetensors'))


def refused(path, *words):
    """Opening it is refused in one line that has these words."""
    with pytest.raises(ValueError) as error:
        load(path)
    text = str(error.value)
    assert '\n' not in text and all(str(word) in text for word in words), f'{words} should stand in: {text}'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """place() makes an empty folder, whose name is no ASCII."""
    return lambda: str(tmp_path_factory.mktemp('模型 🙂 e\u0301'))


@pytest.fixture(scope='module')
def saved(place):
    """saved(model): the folder that transformers writes of it."""
    def folder_of(model):
        folder = place()
        model.save_pretrained(folder)
        return folder
    return folder_of


@pytest.fixture(scope='module')
def whole(saved):
    """whole(kind): (config.json, tensors) as transformers writes them, to be changed and written again."""
    torch.manual_seed(0)
    made = {kind: read(saved(theirs(kind))) for kind in NAMES}
    return lambda kind: tuple(map(dict, made[kind]))

# -----------------------------------------------------------------------------
# The same logits, the same loss, the same text


bools, few = st.booleans(), st.integers(1, 3)
rows = st.lists(st.integers(2, T), min_size=1, max_size=3)  # lengths, before they are padded
ropes = st.one_of(st.fixed_dictionaries({'rope_theta': st.sampled_from([100.0, 1e4, 5e5]), **kind}) for kind in (
    {'rope_type': st.just('default')},
    {'rope_type': st.just('linear'), 'factor': st.sampled_from([1.0, 2.5, 8.0])},
    {'rope_type': st.just('llama3'), 'factor': st.sampled_from([2.0, 8.0]), 'low_freq_factor': st.just(1.0),
     'high_freq_factor': st.sampled_from([2.0, 4.0]), 'original_max_position_embeddings': st.sampled_from([8, 24, 200])}))
CHOICES = {
    'gpt2': st.fixed_dictionaries({
        'n_layer': few, 'n_head': st.sampled_from([1, 2, 6]), 'n_inner': st.sampled_from([None, 12, 20]),  # 12: square
        'activation_function': st.sampled_from(['gelu_new', 'gelu', 'relu']), 'scale_attn_weights': bools,
        'layer_norm_epsilon': st.sampled_from([1e-5, 1e-2]), 'tie_word_embeddings': bools}),
    'bert': st.fixed_dictionaries({
        'num_hidden_layers': few, 'num_attention_heads': st.sampled_from([1, 2, 6]), 'type_vocab_size': few,
        'intermediate_size': st.sampled_from([12, 20]), 'hidden_act': st.sampled_from(['gelu', 'gelu_new', 'relu']),
        'layer_norm_eps': st.sampled_from([1e-12, 1e-2]), 'tie_word_embeddings': bools}),
    't5': st.fixed_dictionaries({
        'num_layers': few, 'num_heads': few, 'd_kv': st.integers(3, 6), 'layer_norm_epsilon': st.sampled_from([1e-6, 1e-2]),
        'feed_forward_proj': st.sampled_from(['relu', 'gelu', 'gated-gelu', 'gated-silu']), 'tie_word_embeddings': bools,
        'relative_attention_num_buckets': st.sampled_from([4, 9, 32]),
        'relative_attention_max_distance': st.sampled_from([18, 128])}),
    'llama': st.fixed_dictionaries({
        'num_hidden_layers': few, 'num_attention_heads': st.sampled_from([6, 12]), 'attention_bias': bools,
        'mlp_bias': bools, 'num_key_value_heads': st.sampled_from([1, 2, 6]), 'head_dim': st.sampled_from([None, 2, 10]),
        'hidden_act': st.sampled_from(['silu', 'gelu_pytorch_tanh']), 'rms_norm_eps': st.sampled_from([1e-6, 1e-2]),
        'tie_word_embeddings': bools, 'rope_parameters': ropes}),
    'mistral': st.fixed_dictionaries({
        'num_hidden_layers': few, 'num_key_value_heads': st.sampled_from([1, 2, 6]), 'head_dim': st.sampled_from([None, 10]),
        'sliding_window': st.sampled_from([None, 1, 2, 7, T - 1, T, 4096]), 'rope_parameters': ropes}),
}


@every_decoder
@given(data=st.data(), lengths=rows, left=bools)
def test_a_decoder_has_the_logits_and_the_loss_of_transformers(kind, data, lengths, left, saved):
    """GPT-2, Llama and Mistral, with padding on either side (b3, b4, b16)."""
    there = theirs(kind, **data.draw(CHOICES[kind]))
    here, _ = load(saved(there))
    ids, keep = some(len(lengths), max(lengths)), padded(lengths, left)
    asked = keep & keep.roll(1, dims=1)  # those that follow a real token
    where = (keep.cumsum(dim=1) - 1).clamp(min=0)
    labels = ids.masked_fill(~asked, IGNORE)  # transformers shifts them by itself, and never asks for the first
    with torch.no_grad():
        expected = there(ids, attention_mask=keep.long(), position_ids=where, labels=labels)
        targets = torch.cat([labels[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
        logits, loss = here.eval()(ids, keep, targets)
    close(logits, expected.logits, keep)
    close(loss[None], expected.loss[None])


@given(choices=CHOICES['bert'], lengths=rows, left=bools)
def test_bert_has_the_logits_and_the_losses_of_transformers(choices, lengths, left, saved):
    """Hidden words and next sentences, with segments and padding; 0 means "is next" there and "is not" here (b8)."""
    there = theirs('bert', **choices)
    here, _ = load(saved(there))
    ids, segments = (some(len(lengths), max(lengths), below=n) for n in (V, choices['type_vocab_size']))
    keep, follows = padded(lengths, left), some(len(lengths), below=2)
    where = (keep.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = there(ids, attention_mask=keep.long(), token_type_ids=segments, position_ids=where)
        close(here.eval()(ids, segments, keep)[0], expected.prediction_logits, keep)
        keep = padded(lengths, left=False)  # there [CLS] must stand in the first column
        targets = ids.masked_fill(~keep | (torch.rand(ids.shape) < 0.5), IGNORE)
        targets[:, 1] = ids[:, 1]
        expected = there(ids, attention_mask=keep.long(), token_type_ids=segments, labels=targets,
                         next_sentence_label=1 - follows)
        logits, loss = here(ids, segments, keep, targets, follows)
        close(here.follows(here.hidden(ids, keep, segments), keep), expected.seq_relationship_logits.flip(1))
    close(logits, expected.prediction_logits[targets != IGNORE])
    close(loss[None], expected.loss[None])


@pytest.mark.parametrize('name', ['BertForMaskedLM', 'BertForNextSentencePrediction', 'BertModel',
                                  'BertForSequenceClassification', 'BertForTokenClassification', 'BertForQuestionAnswering'])
def test_every_head_of_bert_answers_as_in_transformers(name, saved):
    """What the file has no head for is new and said to be; the labels come along in their order."""
    named = {'id2label': dict(enumerate(LABELS)), 'label2id': {label: i for i, label in enumerate(LABELS)}}
    there = theirs('bert', name, **({} if 'Question' in name else named))
    here, checkpoint = load(saved(there))
    ids, segments, keep = some(3, 9), some(3, 9, below=2), padded([9, 6, 2], left=False)
    with torch.no_grad():
        expected = there(ids, attention_mask=keep.long(), token_type_ids=segments)
        logits, hidden = here.eval()(ids, segments, keep)[0], here.hidden(ids, keep, segments)
        if name == 'BertForMaskedLM':
            close(logits, expected.logits, keep)
        elif name == 'BertForNextSentencePrediction':
            close(here.follows(hidden, keep), expected.logits.flip(1))
        elif name == 'BertModel':
            close(hidden, expected.last_hidden_state, keep)
            close(here.pool(hidden, keep), expected.pooler_output)
        elif name == 'BertForQuestionAnswering':
            close(logits[:, 0], expected.start_logits, keep)
            close(logits[:, 1], expected.end_logits, keep)
        else:
            close(logits, expected.logits, keep if 'Token' in name else slice(None))
    task = {'Seq': 'classify', 'Tok': 'tag', 'Que': 'qa'}.get(name[7:10], '')
    assert checkpoint['task'] == here.config.task == task
    assert checkpoint['labels'] == (LABELS if task in ('classify', 'tag') else [])
    new = {key.removeprefix('trunk.').split('.')[0] for key in checkpoint['new']}
    heads = {'transform', 'transform_norm', 'output'}
    assert new == {'BertForMaskedLM': {'pooler', 'is_next'}, 'BertForNextSentencePrediction': heads,
                   'BertForTokenClassification': {'pooler', 'is_next'} | heads,
                   'BertForQuestionAnswering': {'pooler', 'is_next'} | heads}.get(name, {'is_next'} | heads)
    norm = dict(here.named_parameters()).get('trunk.transform_norm.weight')
    assert norm is None or torch.equal(norm, torch.ones(12)), 'a new norm begins at 1'


@given(choices=CHOICES['t5'], own_head=bools, lengths=rows, left=bools, length=st.integers(1, T))
def test_t5_has_the_logits_and_the_loss_of_transformers(choices, own_head, lengths, left, length, saved):
    """1.0 and 1.1, with a head of its own or the shared matrix, scaled or not (b3, b16)."""
    there = theirs('t5', **choices)
    if own_head:
        there.lm_head.weight = nn.Parameter(torch.randn_like(there.lm_head.weight))
    here, checkpoint = load(saved(there))
    assert here.config.tied == (not own_head) and (here.output.weight is here.tokens.weight) == (not own_head)
    ids, keep = some(len(lengths), max(lengths)), padded(lengths, left)
    targets = some(len(lengths), length).masked_fill(~padded([min(length, n) for n in lengths], False)[:, :1], IGNORE)
    targets[0, length // 2 + 1:] = IGNORE  # the tail of a shorter target
    before = F.pad(targets[:, :-1].clamp(min=0), (1, 0))
    with torch.no_grad():
        expected = there(input_ids=ids, attention_mask=keep.long(), labels=targets)
        logits, loss = here.eval()(ids, keep, before, targets)
    close(logits, expected.logits)
    close(loss[None], expected.loss[None])
    assert checkpoint['dropped'] == checkpoint['new'] == []


@every_decoder
@settings(max_examples=10)
@given(data=st.data(), lengths=rows, cuts=st.sets(st.integers(1, T - 1)))
def test_a_decoder_that_remembers_says_what_transformers_says(kind, data, lengths, cuts, saved):
    """In pieces of any length, with padding on the left (b10)."""
    there = theirs(kind, **data.draw(CHOICES[kind]))
    here, _ = load(saved(there))
    ids, keep, cache = some(len(lengths), max(lengths)), padded(lengths, left=True), {}
    at = sorted({0, *(cut for cut in cuts if cut < max(lengths)), max(lengths)})
    with torch.no_grad():
        expected = there(ids, attention_mask=keep.long(), position_ids=(keep.cumsum(dim=1) - 1).clamp(min=0)).logits
        for start, end in zip(at, at[1:]):
            close(here.eval().decode(ids[:, start:end], keep[:, start:end], cache), expected[:, end - 1], keep[:, end - 1])


@settings(max_examples=10)
@given(choices=CHOICES['t5'], lengths=rows, left=bools, cuts=st.sets(st.integers(1, 8)))
def test_t5_that_remembers_says_what_transformers_says(choices, lengths, left, cuts, saved):
    """The source is read once, the target comes in pieces (b10)."""
    there = theirs('t5', **choices)
    here, _ = load(saved(there))
    ids, keep, decoder_ids = some(len(lengths), max(lengths)), padded(lengths, left), some(len(lengths), 9)
    with torch.no_grad():
        expected = there(input_ids=ids, attention_mask=keep.long(), decoder_input_ids=decoder_ids).logits
        cache, at = here.eval().read(ids, keep), [0, *sorted(cuts), 9]
        for start, end in zip(at, at[1:]):
            close(here.decode(decoder_ids[:, start:end], cache=cache), expected[:, end - 1])


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'mistral', 't5'])
def test_greedy_text_is_that_of_transformers_token_by_token(kind, saved):
    """A batch of prompts of several lengths, padded on the left (T5: on the right)."""
    there = theirs(kind)
    there.config.tie_word_embeddings = kind == 't5'
    there.lm_head.weight = nn.Parameter(torch.randn_like(there.lm_head.weight))
    for name, p in there.named_parameters():  # as it is, the stream hardly changes from word to word
        p.data.mul_(0.1 if name.endswith('bias') else 3.0 if re.search(r'\.(h|block)\.', name) else 1.0)
    here, _ = load(saved(there))
    ids, keep = some(4, 9), padded([9, 1, 5, 3], left=kind != 't5')
    written = there.generate(ids, attention_mask=keep.long(), max_new_tokens=12, do_sample=False, pad_token_id=0)[:, -12:]
    prompt, cache = (ids, None) if kind != 't5' else (torch.zeros_like(ids[:, :1]), here.eval().read(ids, keep))
    ours = list(generate(here.eval(), prompt, 12, temperature=0, keep=keep if cache is None else None, cache=cache))
    assert torch.stack(ours, dim=1).tolist() == written.tolist()
    assert len(set(written.flatten().tolist())) >= 5, f'too dull to tell anything: {written.tolist()}'

# -----------------------------------------------------------------------------
# What lies on the hub is older than what transformers writes today


def old_gpt2(w):
    """GPT-2 as released: no prefix, no head, and the triangle stored as if it had been learned."""
    w = {name.removeprefix('transformer.'): t for name, t in w.items()}
    return w, {'h.0.attn.bias': torch.ones(1, 1, T, T).tril(), 'h.1.attn.masked_bias': torch.tensor(-1e4)}


def old_bert(w):
    """BERT as converted from Google's: gamma and beta, numbered positions, one bias of the head."""
    spelled = {name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): t
               for name, t in w.items() if name != 'cls.predictions.decoder.bias'}
    assert spelled.keys() != w.keys() and 'cls.predictions.bias' in spelled
    return spelled, {'bert.embeddings.position_ids': torch.arange(T)[None]}


def copying_bert(w):
    """BERT from a .bin of 2021: the tied matrix twice, and its bias."""
    return w, {'cls.predictions.decoder.weight': w['bert.embeddings.word_embeddings.weight'],
               'cls.predictions.decoder.bias': w['cls.predictions.bias']}


def old_t5(w):
    """T5 as released: three copies of one matrix, and a table of distances that cross-attention never reads (b16)."""
    return w, {'encoder.embed_tokens.weight': w['shared.weight'], 'decoder.embed_tokens.weight': w['shared.weight'],
               'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': torch.randn(32, 2)}


def old_llama(w):
    """Llama before 2024: the speeds of its rotation stored in every layer."""
    return w, {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.randn(2) for i in (0, 1)}


@pytest.mark.parametrize('age', [old_gpt2, old_bert, copying_bert, old_t5, old_llama])
def test_files_of_any_age_open_and_say_what_was_dropped(age, whole, place):
    """The same weights, bit for bit; what else the file holds is named, and only that."""
    kind = age.__name__.split('_')[1]
    about, tensors = whole(kind)
    young, _ = load(write(place(), about, tensors))
    kept, besides = age(tensors)
    old, checkpoint = load(write(place(), about, kept | besides))
    same_weights(young, old)
    prefix = {'gpt2': 'transformer.', 'bert': 'bert.', 't5': '', 'llama': 'model.'}[kind]
    assert checkpoint['dropped'] == sorted(name.removeprefix(prefix) for name in besides), checkpoint['dropped']
    assert checkpoint['new'] == [] and PRESETS[checkpoint['settings']['preset']].arch == old.config.arch


def test_dropped_names_only_what_the_file_had(whole, place):
    """A whole file of today has nothing to drop."""
    for kind in NAMES:
        checkpoint = load(write(place(), *whole(kind)))[1]
        assert checkpoint['dropped'] == checkpoint['new'] == [], f"{kind}: {checkpoint['dropped']}, {checkpoint['new']}"


def test_the_one_bias_of_berts_head_is_found_under_either_name(whole, place):
    """Some files call it cls.predictions.decoder.bias and have no other; transformers takes it from there, too."""
    about, tensors = whole('bert')
    bias = tensors['cls.predictions.decoder.bias'] = tensors.pop('cls.predictions.bias')
    folder = write(place(), about, tensors)
    there = transformers.BertForPreTraining.from_pretrained(folder).cls.predictions.decoder.bias
    assert torch.equal(there, bias)
    here, checkpoint = load(folder)
    assert torch.equal(here.output.bias, bias), f"new: {checkpoint['new']}, dropped: {checkpoint['dropped']}"


ROPES = {  # what LlamaConfig of today says -> what config.json said before
    'base': ({'rope_type': 'default', 'rope_theta': 100.0}, {'rope_theta': 100, 'rope_scaling': None}),
    'linear': ({'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}, {'rope_scaling': {'type': 'linear', 'factor': 4}}),
    'llama3': ({'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                'original_max_position_embeddings': 16},
               {'rope_theta': 500.0, 'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                                                      'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}}),
}


@pytest.mark.parametrize('name', ROPES)
def test_rotation_is_configured_in_the_old_way_and_in_the_new(name, saved, place):
    """rope_theta and rope_scaling, with "type" or "rope_type", mean what rope_parameters mean."""
    new, old = ROPES[name]
    there = theirs('llama', rope_parameters=new)
    about, tensors = read(saved(there))
    del about['rope_parameters'], about['head_dim'], about['mlp_bias']
    ids = some(2, T)
    with torch.no_grad():
        expected = there(ids).logits
        close(load(write(place(), about | old, tensors))[0].eval()(ids)[0], expected)
        if name != 'base':  # and it does matter
            assert (load(write(place(), about, tensors))[0].eval()(ids)[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize('name', ['own', 'copy', 'shared'])
@pytest.mark.parametrize('scaled', [True, False])
@pytest.mark.parametrize('said', ['scale_decoder_outputs', 'tie_word_embeddings'])
def test_the_head_of_t5_is_what_the_file_has_scaled_as_its_configuration_says(name, scaled, said, whole, place):
    """1.1 has a matrix of its own and says so by tie_word_embeddings=false, which also meant: do not scale."""
    about, tensors = whole('t5')
    about = {key: value for key, value in about.items() if key not in ('scale_decoder_outputs', 'tie_word_embeddings')}
    head = torch.randn(V, 12) if name == 'own' else tensors['shared.weight']
    tensors |= {} if name == 'shared' else {'lm_head.weight': head}
    here, _ = load(write(place(), about | {said: scaled}, tensors))
    ids, decoder_ids = some(2, 5), some(2, 4)
    with torch.no_grad():
        x = here.eval().decoder(decoder_ids, memory=here.hidden(ids))
        close(here(ids, None, decoder_ids)[0], x @ head.T * (12 ** -0.5 if scaled else 1.0))


HUB = {  # what config.json of well-known models says besides sizes
    'gpt2': '''{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id":
        50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout":
        0.1, "summary_type": "cls_index", "summary_proj_to_labels": true, "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}}''',
    'gpt2 bare': '''{"model_type": "gpt2", "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}''',
    'bert': '''{"architectures": ["BertForPreTraining"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "model_type": "bert", "pad_token_id": 0, "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute", "gradient_checkpointing": false, "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2, "use_cache": true}''',
    't5': '''{"architectures": ["T5WithLMHeadModel"], "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
        "initializer_factor": 1.0, "is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "output_past": true, "pad_token_id": 0, "relative_attention_num_buckets": 32, "task_specific_params":
        {"summarization": {"early_stopping": true, "length_penalty": 2.0, "num_beams": 4, "prefix": "summarize: "}}}''',
    't5 flan': '''{"architectures": ["T5ForConditionalGeneration"], "dense_act_fn": "relu", "feed_forward_proj": "relu",
        "is_gated_act": false, "model_type": "t5", "relative_attention_max_distance": 128, "tie_word_embeddings": false,
        "torch_dtype": "float32", "classifier_dropout": 0.0, "output_past": true, "use_cache": true}''',
    'llama 1': '''{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "initializer_range": 0.02, "max_sequence_length": 2048, "model_type": "llama", "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version":
        "4.28.0.dev0", "use_cache": true}''',
    'llama 2': '''
        {"_name_or_path": "x/y", "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout":
        0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.02, "model_type":
        "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true}''',
    'llama smol': '''
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "initializer_range": 0.0416, "is_llama_config": true, "model_type":
        "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers.js_config":
        {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.40.1", "use_cache": true}''',
}


@pytest.mark.parametrize('name', HUB)
def test_configurations_of_well_known_models_open(name, whole, place):
    """None of their many fields is taken for one that the model cannot honour."""
    kind = name.split()[0]
    folder = write(place(), NAMES[kind][1] | json.loads(HUB[name]), whole(kind)[1])
    assert load(folder)[0].config.vocab_size == V


@every_family
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_halves_load_as_float32(kind, dtype, whole, place):
    """Every value as the file has it, in the one type that training here begins with."""
    about, tensors = whole(kind)
    half = {name: t.to(dtype) for name, t in tensors.items()}
    model, _ = load(write(place(), about, half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same_weights(model, load(write(place(), about, {name: t.float() for name, t in half.items()}))[0])


@every_family
def test_one_file_several_files_and_pickles_are_the_same_model(kind, whole, place):
    """model.safetensors, shards with their index, and pytorch_model.bin in both formats that torch has had."""
    about, tensors = whole(kind)
    one, _ = load(write(place(), about, tensors))
    several = place()
    names = sorted(tensors)
    shards = {f'model-{i + 1:05}-of-00003.safetensors': names[i::3] for i in range(3)}
    for shard, part in shards.items():
        write(several, about, {name: tensors[name] for name in part}, shard)
    with open(os.path.join(several, 'model.safetensors.index.json'), 'w') as f:
        json.dump({'metadata': {}, 'weight_map': {name: shard for shard, part in shards.items() for name in part}}, f)
    same_weights(one, load(several)[0])
    same_weights(one, load(write(place(), about, tensors, 'pytorch_model.bin'))[0])
    old = write(place(), about, tensors, 'pytorch_model.bin')
    torch.save(tensors, os.path.join(old, 'pytorch_model.bin'), _use_new_zipfile_serialization=False)  # before torch 1.6
    same_weights(one, load(old)[0])


def test_a_bare_name_is_fetched_from_the_hub(whole, place, tmp_path, monkeypatch):
    """gpt2 and google/flan-t5-small go to the hub, with what is worth fetching; what is on the disk does not."""
    monkeypatch.chdir(tmp_path)
    asked, folder = [], write(place(), *whole('gpt2'))

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return folder
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    for name in ('gpt2', 'google/flan-t5-small', 'a.b/c_d-1.5'):
        assert load(name)[0].config.vocab_size == V
    assert [name for name, _ in asked] == ['gpt2', 'google/flan-t5-small', 'a.b/c_d-1.5']
    assert {'*.json', 'model*.safetensors'} <= set(asked[0][1]) and not any('bin' in p or p == '*' for p in asked[0][1])
    asked.clear()
    os.mkdir('gpt2')
    load(write('gpt2', *whole('gpt2')))
    for path in ('a/b/c', '../gpt3', '/gpt3', 'ckpt.pt', './gpt3', 'out/ckpt.pt', '喵 喵'):
        with pytest.raises(FileNotFoundError):
            load(path)
    assert asked == []


@pytest.mark.parametrize('installed', [True, False])
def test_without_the_hub_one_sentence_says_what_to_download(installed, tmp_path, monkeypatch):
    """Offline, unknown there, or no huggingface_hub: the files and where they are."""
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError('no network\nno cache')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    if not installed:
        monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(FileNotFoundError) as error:
        load('google/flan-t5-small')
    text = str(error.value)
    assert '\n' not in text
    for word in ('config.json', 'model.safetensors', 'tokenizer', 'https://huggingface.co/google/flan-t5-small'):
        assert word in text, f'{word} should stand in: {text}'

# -----------------------------------------------------------------------------
# nanoGPT


@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_a_checkpoint_of_nanogpt_has_the_logits_of_its_model(bias, compiled, tmp_path):
    """Its names are GPT-2's, its matrices lie the other way, and its GELU is the exact one (b16)."""
    there = theirs('gpt2', activation_function='gelu')
    state = {}
    for name, p in there.state_dict().items():
        if name.endswith('bias') and not bias:
            p.zero_()  # what is not there adds nothing
            continue
        turned = re.search(r'\.c_\w+\.weight$', name)
        state['_orig_mod.' * compiled + name] = p.t().contiguous() if turned else p
    state['_orig_mod.' * compiled + 'transformer.h.0.attn.bias'] = torch.ones(1, 1, T, T).tril()  # without flash attention
    sizes = dict(n_layer=2, n_head=2, n_embd=12, block_size=T, bias=bias, vocab_size=V, dropout=0.2)
    path = tmp_path / 'ckpt.pt'
    torch.save({'model': state, 'optimizer': {}, 'model_args': sizes, 'iter_num': 7, 'best_val_loss': torch.tensor(1.5),
                'config': {'dataset': 'shakespeare_char'}}, path)
    ids = some(2, T)
    for where in (path, tmp_path):
        here, checkpoint = load(where)
        with torch.no_grad():
            close(here.eval()(ids)[0], there(ids).logits)
    assert here.output.weight is here.tokens.weight and Config(**checkpoint['config']) == here.config
    assert not bias or len(list(here.parameters())) == len(list(there.parameters()))
    export_huggingface(here, tmp_path / 'out')
    with torch.no_grad():
        close(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out')(ids).logits, there(ids).logits)


def test_a_broken_checkpoint_of_nanogpt_says_what_is_wrong(tmp_path, monkeypatch):
    """A size that is missing, a tensor that is missing, one too many, and a number of layers that nobody can build."""
    there = theirs('gpt2', activation_function='gelu')
    state = {name: p.t() if re.search(r'\.c_\w+\.weight$', name) else p for name, p in there.state_dict().items()}
    sizes, path = dict(n_layer=2, n_head=2, n_embd=12, block_size=T, bias=True, vocab_size=V), tmp_path / 'ckpt.pt'

    def check(*words, sizes=sizes, state=state):
        torch.save({'model': state, 'model_args': sizes}, path)
        refused(path, path, *words)

    check('bias', sizes={name: size for name, size in sizes.items() if name != 'bias'})
    check('missing', 'attn.qkv.weight', state={n: p for n, p in state.items() if 'h.1.attn.c_attn.weight' not in n})
    check('extra.weight', state=state | {'transformer.extra.weight': torch.ones(1)})
    check('positions.weight', sizes=sizes | {'block_size': 2 * T})
    few_blocks(monkeypatch)
    check('n_layer', sizes=sizes | {'n_layer': 10 ** 9})

# -----------------------------------------------------------------------------
# Nothing is ignored, nothing is missing, nothing hangs


def few_blocks(monkeypatch):
    """A model of more than a hundred blocks cannot be built, so that a test ends where the code would not."""
    made, block = [], model_py.Block

    def counting(*args):
        made.append(1)
        assert len(made) < 100, 'a model of 10**9 blocks is being built'
        return block(*args)
    monkeypatch.setattr(model_py, 'Block', counting)


@pytest.mark.parametrize('kind, field, value', [
    ('gpt2', 'activation_function', 'silu'), ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gpt2', 'add_cross_attention', True), ('gpt2', 'architectures', ['GPT2ForSequenceClassification']),
    ('bert', 'hidden_act', 'silu'), ('bert', 'is_decoder', True), ('bert', 'position_embedding_type', 'relative_key'),
    ('bert', 'problem_type', 'multi_label_classification'), ('bert', 'pruned_heads', {'0': [1]}),
    ('t5', 'num_decoder_layers', 3), ('t5', 'feed_forward_proj', 'gated-relu'), ('t5', 'architectures', ['T5EncoderModel']),
    ('llama', 'hidden_act', 'relu'), ('llama', 'sliding_window', 4096), ('llama', 'partial_rotary_factor', 0.5),
    ('llama', 'rope_parameters', {'rope_type': 'yarn', 'factor': 2.0, 'rope_theta': 1e4}),
    ('llama', 'rope_parameters', {'rope_type': 'llama3', 'factor': 2.0}),
    ('llama', 'rope_parameters', {'rope_type': 'default', 'partial_rotary_factor': 0.5}),
    ('llama', 'quantization_config', {'bits': 4}), ('llama', 'model_type', 'mixtral'), ('llama', 'model_type', '喵'),
    ('mistral', 'attention_bias', True), ('mistral', 'sliding_window', -1),
    ('gpt2', 'eine_neue_Größe', '🙂'), ('bert', 'embedding_size', 128), ('llama', 'attention_sinks', 1)])
def test_a_field_that_cannot_be_honoured_is_refused_by_name(kind, field, value, whole, place):
    """Never ignored: a model that computes something else is worse than none."""
    about, tensors = whole(kind)
    refused(write(place(), about | {field: value}, tensors), 'config.json', field, repr(value))


def test_an_old_rope_scaling_that_cannot_be_honoured_is_refused_by_name(whole, place):
    """Also where rope_parameters does not stand in the file."""
    about, tensors = whole('llama')
    about = {name: value for name, value in about.items() if name != 'rope_parameters'}
    refused(write(place(), about | {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, tensors), 'rope_scaling', 'dynamic')


WRONG = {'a row less': lambda t: t[:-1], 'a column less': lambda t: t[..., 1:], 'a dimension more': lambda t: t[None],
         'twice as long': lambda t: torch.cat([t, t]), 'a number': lambda t: t.flatten()[0]}


@every_family
@settings(max_examples=15)
@given(data=st.data())
def test_a_tensor_that_is_missing_unexpected_or_misshapen_is_named(kind, data, whole, place):
    """Every tensor is accounted for. Only a head that a BERT lacks is made new, and listed."""
    about, tensors = whole(kind)
    name = data.draw(st.sampled_from(sorted(tensors)))
    short = re.sub(r'^(transformer|bert|model)\.', '', name)
    lacking = write(place(), about, {other: t for other, t in tensors.items() if other != name})
    if short.startswith(('cls.', 'pooler.')):
        checkpoint = load(lacking)[1]
        assert len(checkpoint['new']) == 1 and checkpoint['dropped'] in ([], ['cls.predictions.decoder.bias']), checkpoint
    else:
        refused(lacking, short, 'missing')
    t = tensors[name]
    wrong = WRONG[data.draw(st.sampled_from(sorted(WRONG)))](t)
    refused(write(place(), about, tensors | {name: wrong}), short)
    refused(write(place(), about, tensors | {name + '.größer': t}), short + '.größer', 'not part of')


def test_parts_of_other_sizes_are_refused_though_their_sum_is_right(whole, place):
    """Queries, keys and values lie in one matrix here: 24 + 8 + 8 rows are not 8 + 24 + 8. So do the halves of a gate."""
    about, tensors = whole('llama')
    for a, b in (('self_attn.q_proj', 'self_attn.k_proj'), ('mlp.gate_proj', 'mlp.up_proj')):
        a, b = f'model.layers.0.{a}.weight', f'model.layers.0.{b}.weight'
        rows = torch.cat([tensors[a], tensors[b]])
        cut = len(tensors[b]) if 'attn' in a else 7
        refused(write(place(), about, tensors | {a: rows[:cut], b: rows[cut:]}), a.removeprefix('model.'), (cut, 24))


@pytest.mark.parametrize('field', ['attention_bias', 'mlp_bias'])
def test_a_bias_that_the_configuration_promises_must_be_there(field, saved, place):
    """What the configuration does not promise may be lacking, and is 0."""
    about, tensors = read(saved(theirs('llama', **{field: True})))
    load(write(place(), about, tensors))
    bare = {name: t for name, t in tensors.items() if not name.endswith('.bias')}
    assert len(bare) < len(tensors)
    refused(write(place(), about, bare), '.bias', 'missing')


@every_family
def test_the_dtype_of_a_weight_is_a_float(kind, whole, place):
    """Whole numbers are no weights, but a mistake or a compression that nobody here can undo."""
    about, tensors = whole(kind)
    refused(write(place(), about, {name: t.long() for name, t in tensors.items()}), 'int64')


JUNK = [None, True, False, 0, -1, 3, 2.5, -0.5, float('nan'), 10 ** 400, '', '喵', '12', 'gelu\n', [], [1], [[]], [None], {},
        {'a': 'e\u0301'}, {'rope_type': []}, {'rope_type': 'linear', 'factor': '🙂'}, {'rope_type': 'linear', 'factor': [1]}]


@every_family
def test_anything_in_any_field_is_honoured_or_refused_in_one_line(kind, whole):
    """All JSON that a hand or a crash could leave there, in every field that is read."""
    about, wrong = whole(kind)[0], []
    for field in sorted({*about, *FAMILIES[kind].fields, 'architectures', 'rope_scaling', 'tie_word_embeddings', 'größe'}):
        for value in JUNK:
            try:
                config_from(about | {field: value}, 'config.json')
            except ValueError as e:
                if '\n' in str(e):
                    wrong.append(f'{field}={value!r}: {e!r}')
            except Exception as e:
                wrong.append(f'{field}={repr(value)[:40]}: {e!r}')
    assert not wrong, f'{len(wrong)}, such as: ' + '; '.join(wrong[:3])


@pytest.mark.parametrize('named', [['好'], {'0': '好'}, {'a': '好', 'b': '坏'}, '🙂', 5])
def test_labels_that_make_no_sense_are_refused_by_name(named, saved, place):
    """id2label is a dict from numbers to texts, as many as the head has rows."""
    about, tensors = read(saved(theirs('bert', 'BertForSequenceClassification')))
    word = 'classifier.weight' if named == {'0': '好'} else 'id2label'
    refused(write(place(), about | {'id2label': named}, tensors), word)


@every_family
def test_an_absurd_number_of_layers_is_refused_at_once(kind, whole, place, monkeypatch):
    """10**9 blocks, even without memory for their weights, would take days."""
    few_blocks(monkeypatch)
    field = next(name for name in ('n_layer', 'num_hidden_layers', 'num_layers') if name in NAMES[kind][1])
    about = {name: value for name, value in whole(kind)[0].items() if name != 'num_decoder_layers'}
    refused(write(place(), about | {field: 10 ** 9}, whole(kind)[1]), 'config.json', 10 ** 9)


@pytest.mark.parametrize('kind, field, size', [('gpt2', 'vocab_size', 10 ** 18), ('gpt2', 'n_positions', 10 ** 18),
                                               ('llama', 'head_dim', 10 ** 18), ('bert', 'intermediate_size', 10 ** 30),
                                               ('t5', 'd_ff', 10 ** 12), ('llama', 'max_position_embeddings', 10 ** 18)])
def test_an_absurd_size_is_refused_in_one_line(kind, field, size, whole, place):
    """No memory is asked for, whatever the number."""
    about, tensors = whole(kind)
    refused(write(place(), about | {field: size}, tensors))


@pytest.mark.parametrize('text', [b'', b'{', b'null', b'[1]', b'"\xe5\x96\xb5"', b'3', b'\xff\xfe{}', b'{"model_type": }',
                                  b'[' * 100_000, '喵'.encode()])
def test_a_config_json_that_is_no_configuration_is_refused(text, whole, place):
    """Half a file, a list, a picture: all the same."""
    folder = write(place(), *whole('gpt2'))
    with open(os.path.join(folder, 'config.json'), 'wb') as f:
        f.write(text)
    refused(folder, 'config.json')


@settings(max_examples=15)
@given(share=st.floats(0, 0.999), name=st.sampled_from(['model.safetensors', 'pytorch_model.bin']))
def test_weights_cut_anywhere_are_refused(share, name, whole, place):
    """A download that broke off."""
    folder = write(place(), *whole('gpt2'), name)
    path = os.path.join(folder, name)
    with open(path, 'r+b') as f:
        f.truncate(int(share * os.path.getsize(path)))
    refused(folder, folder, 'fetch them again')


@pytest.mark.parametrize('holds', [[1], {'transformer.wte.weight': 7}, {5: torch.ones(1)}, torch.ones(3), 'weights', None])
def test_a_pickle_that_holds_no_tensors_is_refused(holds, whole, place):
    """Plain data, but not the weights of a model."""
    about, tensors = whole('gpt2')
    folder = write(place(), about, tensors | holds if isinstance(holds, dict) else holds, 'pytorch_model.bin')
    refused(folder, folder)


class Trap:
    """Pickled, it would write a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_code_in_a_pickle_does_not_run(whole, place, tmp_path):
    """Opening weights never runs what is in them."""
    about, tensors = whole('gpt2')
    folder = write(place(), about, {**tensors, 'trap': Trap(str(tmp_path / 'sprung'))}, 'pytorch_model.bin')
    refused(folder, folder)
    assert not (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('shard', ['../x.safetensors', '/etc/passwd', 'a/../../x.safetensors', '..', '', 'lost', 3])
def test_an_index_names_files_of_its_own_folder_only(shard, whole, place):
    """Neither one outside of it, though it be there and hold weights, nor one that is not there."""
    about, tensors = whole('gpt2')
    folder = place()
    inside = os.path.join(folder, 'in')
    os.mkdir(inside)
    save_file(tensors, os.path.join(folder, 'x.safetensors'))
    write(inside, about, {}, 'none.safetensors')
    with open(os.path.join(inside, 'model.safetensors.index.json'), 'w') as f:
        json.dump({'weight_map': {name: shard for name in tensors}}, f)
    refused(inside, inside)


@pytest.mark.parametrize('index', ['', '[]', '{}', '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(index, whole, place):
    """Half a file, and JSON that says nothing of weights."""
    folder = write(place(), *whole('gpt2'))
    with open(os.path.join(folder, 'model.safetensors.index.json'), 'w') as f:
        f.write(index)
    refused(folder, folder)


def test_a_folder_without_weights_says_which_files_it_needs(whole, place):
    """config.json alone is what a clone without large files has."""
    folder = write(place(), *whole('gpt2'))
    os.remove(os.path.join(folder, 'model.safetensors'))
    refused(folder, folder, 'model.safetensors', 'pytorch_model.bin')


def test_without_safetensors_one_sentence_says_what_to_install(whole, place, monkeypatch):
    """It is an optional package: reading and writing name it."""
    folder = write(place(), *whole('gpt2'))
    model, _ = load(folder)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    refused(folder, 'pip install safetensors')
    with pytest.raises(ValueError, match='pip install safetensors'):
        export_huggingface(model, place())

# -----------------------------------------------------------------------------
# What was loaded is a model like any other


@every_family
def test_loading_draws_no_random_numbers(kind, whole, place):
    """So no model was made first to be overwritten: a large one would need its memory twice, and minutes."""
    folder, before = write(place(), *whole(kind)), torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def loss_of(model):
    """A loss that every weight takes part in."""
    ids = some(4, 10)
    if model.config.arch == 'encdec':
        return model(ids, None, some(4, 6), some(4, 6))[1]
    if model.config.arch == 'bert':
        return model(ids, some(4, 10, below=2), None, some(4, 10), some(4, below=2))[1]
    return model(ids, None, some(4, 10))[1]


@every_family
@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_training_goes_on_from_what_was_loaded(kind, name, whole, place):
    """Every weight is trained, each once; a tied one stays one (b5); and the file stays as it was."""
    folder = write(place(), *whole(kind), name)
    model, _ = load(folder)
    assert model.config.tied == (kind not in ('llama', 'mistral')) == (model.output.weight is model.tokens.weight)
    groups = optimizer_groups(model, 0.1)
    assert len({id(p) for group in groups for p in group['params']}) == len(list(model.parameters()))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    places = [p.data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places), 'two weights lie in the same memory'
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)
        losses.append(loss_of(model.train()))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.requires_grad and p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1, f'{losses[0]:.3f} -> {losses[-1]:.3f}'
    assert not [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    assert (model.output.weight is model.tokens.weight) == model.config.tied
    again, _ = load(folder)
    assert not [key for key, p in again.named_parameters() if not torch.equal(p, before[key])], 'the file has changed'


def test_a_pickle_that_ties_does_not_tie_twice(whole, place):
    """A .bin of T5 has its matrix under four names in one memory: two weights there would each take every step."""
    about, tensors = whole('t5')
    shared = tensors['shared.weight']
    copies = dict.fromkeys(['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight'], shared)
    model, _ = load(write(place(), about, tensors | copies, 'pytorch_model.bin'))
    assert torch.equal(model.output.weight, shared)
    places = {p.data_ptr() for p in model.parameters()}
    assert len(places) == len(list(model.parameters())), 'two weights lie in the same memory'


@every_family
def test_a_loaded_model_can_be_shortened_and_given_more_tokens(kind, whole, place):
    """load(..., block_size, vocab_size, dropout): the first tokens as before, and export cuts the new ones off again."""
    folder = write(place(), *whole(kind))
    old, _ = load(folder)
    new, _ = load(folder, block_size=8, vocab_size=V + 3, dropout=0.1)
    assert (new.config.block_size, new.config.vocab_size, new.config.dropout) == (8, V + 3, 0.1)
    assert len(new.tokens.weight) == V + 3 and torch.equal(new.tokens.weight[:V], old.tokens.weight)
    assert (new.output.weight is new.tokens.weight) == old.config.tied
    back = os.path.join(place(), 'back')
    export_huggingface(new, back, vocab_size=V)
    cut, _ = load(back)
    assert cut.config.vocab_size == V and read(back)[0]['vocab_size'] == V
    with torch.no_grad():
        args = (some(2, 8), None, some(2, 5)) if kind == 't5' else (some(2, 8),)
        assert torch.equal(cut.eval()(*args)[0], old.eval()(*args)[0])

# -----------------------------------------------------------------------------
# Out again


def ours(preset, **changes):
    """A tiny model of a row of the table, as trained here."""
    sizes = {'vocab_size': V, 'block_size': T, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    row = PRESETS[preset]
    sizes |= {'mlp_dim': min(row.mlp_dim, 40), 'head_dim': min(row.head_dim, 12)}
    return awake(build(dataclasses.replace(row, **{**sizes, **changes})))


def logits_of(model, ids, decoder_ids):
    """Of either side's models: (B, T, V)."""
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            out = model(ids, decoder_input_ids=decoder_ids) if model.config.is_encoder_decoder else model(ids)
            return out.get('logits', out.get('prediction_logits'))
        return (model(ids, None, decoder_ids) if model.config.arch == 'encdec' else model(ids))[0]


@pytest.mark.parametrize('preset, choices', [
    ('gpt2', {}), ('gpt2', {'bias': False}), ('gpt2', {'activation': 'relu2', 'mlp_dim': 20, 'norm_eps': 1e-3}),
    ('gpt2', {'activation': 'gelu', 'tied': False, 'scale_attention': False}),
    ('bert', {}), ('bert', {'bias': False}), ('bert', {'activation': 'relu', 'segments': 3, 'mlp_dim': 20}),
    ('bert', {'activation': 'gelu_tanh', 'tied': False, 'norm_eps': 1e-3}),
    ('t5', {}), ('t5', {'activation': 'geglu', 'tied': False, 'scale_output': False, 'buckets': 8, 'max_distance': 18}),
    ('t5', {'activation': 'swiglu', 'scale_output': False, 'n_head': 3}), ('t5', {'activation': 'gelu', 'tied': False}),
    ('llama', {}), ('llama', {'bias': True, 'tied': True, 'head_dim': 10, 'n_kv_head': 4}),
    ('llama', {'activation': 'geglu', 'rope_scaling': 'linear 4', 'n_kv_head': 1}),
    ('llama', {'rope_theta': 500.0, 'rope_scaling': 'llama3 8 1 4 16'}),
    ('llama', {'window': '5', 'n_kv_head': 1})])
def test_what_was_trained_here_opens_in_transformers(preset, choices, place):
    """No key missing, none unexpected, the same logits; and read back here, every weight has the same bits (b16)."""
    model, folder = ours(preset, **choices), os.path.join(place(), 'new')
    export_huggingface(model, folder, bos_token_id=3)
    about = read(folder)[0]
    there, info = getattr(transformers, about['architectures'][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids, decoder_ids = some(2, T), some(2, 7)
    close(logits_of(model, ids, decoder_ids), logits_of(there.eval(), ids, decoder_ids))
    assert about['bos_token_id'] == 3 and sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    back, checkpoint = load(folder)
    assert checkpoint['new'] == []
    if choices.get('bias') is False:  # there every layer has one: 0 adds nothing
        have = dict(model.named_parameters())
        assert all(torch.equal(p, have.get(name, torch.zeros_like(p))) for name, p in back.named_parameters())
    else:
        same_weights(model, back)
        same = dict.fromkeys(('n_kv_head', 'head_dim', 'mlp_dim'), 0) | {'n_head': 1, 'init': 'gpt2'}
        assert dataclasses.replace(back.config, **same) == dataclasses.replace(model.config, **same)
        for name in ('n_head', 'kv_heads', 'head_size'):
            assert getattr(back.config, name) == getattr(model.config, name), name
    again = os.path.join(place(), 'again')
    export_huggingface(back, again)
    first, second = read(folder), read(again)
    assert first[1].keys() == second[1].keys() and all(torch.equal(t, second[1][name]) for name, t in first[1].items())


@every_family
@settings(max_examples=8)
@given(data=st.data())
def test_import_and_export_are_the_way_there_and_back(kind, data, saved, place):
    """What transformers wrote comes out as it went in: the same names, the same bits, the same answers."""
    folder, back = saved(theirs(kind, **data.draw(CHOICES[kind]))), os.path.join(place(), 'back')
    model, checkpoint = load(folder)
    export_huggingface(model, back)
    before, after = read(folder)[1], read(back)[1]
    kept, added = before.keys() - checkpoint['dropped'], after.keys() - before.keys()
    assert kept <= after.keys() and not [name for name in added if after[name].any()], (kept - after.keys(), added)
    assert not [name for name in kept if not torch.equal(before[name], after[name])]
    same_weights(model, load(back)[0])


@pytest.mark.parametrize('task, name', [('classify', 'BertForSequenceClassification'), ('tag', 'BertForTokenClassification'),
                                        ('qa', 'BertForQuestionAnswering')])
def test_a_bert_with_a_head_opens_in_the_class_of_its_task(task, name, place):
    """With only what that class has: no other head, and a pooler only for whole texts."""
    model, folder = ours('bert', task=task, n_labels=0 if task == 'qa' else len(LABELS)), place()  # an empty one may exist
    fields = {} if task == 'qa' else {'id2label': dict(enumerate(LABELS)), 'label2id': {n: i for i, n in enumerate(LABELS)}}
    export_huggingface(model, folder, **fields)
    there, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids, segments, keep = some(3, 9), some(3, 9, below=2), padded([9, 5, 2], left=False)
    back, checkpoint = load(folder)
    assert checkpoint['labels'] == ([] if task == 'qa' else LABELS) and checkpoint['task'] == task
    assert all(n.startswith(('trunk.transform', 'trunk.output.bias', 'trunk.is_next', 'trunk.pooler' if task != 'classify'
                             else 'trunk.is_next')) for n in checkpoint['new']), checkpoint['new']
    same_weights(model, back, but=checkpoint['new'])
    with torch.no_grad():
        expected = there.eval()(ids, attention_mask=keep.long(), token_type_ids=segments)
        expected = torch.stack([expected.start_logits, expected.end_logits], dim=1) if task == 'qa' else expected.logits
        logits, again = model(ids, segments, keep)[0], back.eval()(ids, segments, keep)[0]
    real = {'classify': slice(None), 'tag': keep, 'qa': keep[:, None].expand(3, 2, 9)}[task]
    close(logits, expected, real)
    assert torch.equal(logits, again)


def test_labels_without_names_are_numbered(place):
    """A head needs id2label, or transformers would think of two labels."""
    folder = place()
    export_huggingface(ours('bert', task='classify', n_labels=3), folder)
    assert transformers.BertForSequenceClassification.from_pretrained(folder).num_labels == 3
    assert load(folder)[1]['labels'] == ['LABEL_0', 'LABEL_1', 'LABEL_2']


@pytest.mark.parametrize('preset, choices, named', [
    ('nano', {}, ['norm_weight=False', 'qk_norm=True', 'activation=relu2', 'logit_cap=15.0']),
    ('palm', {}, ['parallel=True', 'norm=layernorm', 'scale_output=True']),
    ('transformer', {}, ['positions=sinusoids', 'norm_first=False']), ('lstm', {}, ['arch=lstm']),
    ('gpt2', {'logit_cap': 5.0}, ['gpt2', 'logit_cap=5.0']), ('gpt2', {'activation': 'swiglu'}, ['activation=swiglu']),
    ('gpt2', {'n_kv_head': 2}, ['n_kv_head=2']), ('gpt2', {'head_dim': 10}, ['head_dim=10']),
    ('bert', {'norm_first': True}, ['bert', 'norm_first=True']), ('t5', {'bias': True}, ['t5', 'bias=True']),
    ('llama', {'window': '5 0'}, ['window=5 0']), ('llama', {'window': '5', 'bias': True}, ['window=5']),
    ('gpt2', {'window': '5'}, ['window=5']),
    ('llama', {'qk_norm': True, 'scale_embedding': True}, ['llama', 'qk_norm=True', 'scale_embedding=True']),
    ('gpt2', {'task': 'classify', 'n_labels': 3}, ['task=classify']), ('llama', {'task': 'qa'}, ['task=qa'])])
def test_what_no_class_computes_is_refused_with_the_choices_in_the_way(preset, choices, named, place):
    """All of them by name, in one line, and nothing is written."""
    model, folder = ours(preset, **choices), os.path.join(place(), 'new')
    with pytest.raises(ValueError) as error:
        export_huggingface(model, folder)
    text = str(error.value)
    assert '\n' not in text and all(word in text for word in named), f'{named} should stand in: {text}'
    assert not os.path.exists(folder)


def test_a_folder_that_holds_something_is_left_alone(place):
    """Neither replaced nor added to."""
    folder = place()
    path = os.path.join(folder, '笔记.txt')
    with open(path, 'w', encoding='utf-8') as f:
        f.write('mine')
    with pytest.raises(ValueError, match='not empty'):
        export_huggingface(ours('gpt2'), folder)
    assert os.listdir(folder) == ['笔记.txt'] and open(path, encoding='utf-8').read() == 'mine'


@pytest.mark.parametrize('preset', ['gpt2', 'bert', 't5', 'llama'])
def test_only_the_first_tokens_go_out(preset, place):
    """vocab_size cuts what was added: embeddings, an output layer of its own, and its bias."""
    model, folder = ours(preset), place()
    export_huggingface(model, folder, vocab_size=V - 4)
    about, _ = read(folder)
    there, info = getattr(transformers, about['architectures'][0]).from_pretrained(folder, output_loading_info=True)
    assert about['vocab_size'] == V - 4 and not any(info.values()), info
    ids, decoder_ids = some(2, 9, below=V - 4), some(2, 5, below=V - 4)
    close(logits_of(there.eval(), ids, decoder_ids), logits_of(model, ids, decoder_ids)[..., :V - 4])


def test_more_tokens_than_there_are_do_not_go_out(place):
    """A folder whose configuration says more than its tensors hold would open nowhere."""
    folder = os.path.join(place(), 'new')
    with pytest.raises(ValueError, match='vocab_size'):
        export_huggingface(ours('gpt2'), folder, vocab_size=V + 1)
    assert not os.path.exists(folder)
