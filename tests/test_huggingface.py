"""
Hugging Face folders: what model.py and prepare_data.py read of them, and what sample.py exports.

The package transformers is right by definition, so every test compares with it: logits, losses,
token ids, and the texts that it generates. Models are tiny and random, tokenizers learn from four
lines; nothing is downloaded.
"""

import os

os.environ |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error'}

import dataclasses
import json
import random
import re
import runpy
import shutil

import huggingface_hub
import pytest
import tokenizers as hf
import torch
import transformers
from conftest import close, command, one_line, refused, same
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prepare_data
import sample
import train
from model import IGNORE_INDEX, PRESETS, build, export_huggingface, load, save
from prepare_data import load_tokenizer

transformers.utils.logging.disable_progress_bar()

V, T = 61, 24  # vocabulary and longest text of the tiny models
BERT_SIZES = dict(vocab_size=V, max_position_embeddings=T, hidden_size=12, num_hidden_layers=2,
                  num_attention_heads=2, intermediate_size=20)
LLAMA_SIZES = dict(vocab_size=V, max_position_embeddings=T, hidden_size=24, intermediate_size=20,
                   num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
MODELS = {  # family: (the class that is meant where a test names only the family, its sizes)
    'gpt2': ('GPT2LMHeadModel', dict(vocab_size=V, n_positions=T, n_embd=12, n_layer=2, n_head=2)),
    'bert': ('BertForPreTraining', BERT_SIZES),
    't5': ('T5ForConditionalGeneration', dict(
        vocab_size=V, n_positions=T, d_model=12, d_kv=5, d_ff=20, num_layers=2, num_heads=2,
        decoder_start_token_id=0)),
    'llama': ('LlamaForCausalLM', LLAMA_SIZES),
    'mistral': ('MistralForCausalLM', LLAMA_SIZES | dict(sliding_window=5)),
}
some = lambda n: settings(max_examples=n, phases=[Phase.explicit, Phase.generate])  # no shrinking
every_family = pytest.mark.parametrize('family', MODELS)

def wide(model):
    """Random weights, none of them 0 or 1, so wide that no two logits are close to each other."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.5 if p.dim() < 2 else 0.0, 0.3)
    return model.eval()

def reference(family, name=None, **choices):
    """A tiny model of transformers."""
    cls = getattr(transformers, name or MODELS[family][0])
    ends = {'bos_token_id': None, 'eos_token_id': None}
    return wide(cls(cls.config_class(**{**MODELS[family][1], **ends, **choices})))

def read(folder):
    """config.json and the weights of a folder."""
    about = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return about, load_file(folder / 'model.safetensors')

def put(folder, name, data):
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    (folder / name).write_text(text, encoding='utf-8')

def write(folder, about, tensors, name='model.safetensors'):
    put(folder, 'config.json', about)
    save_file({key: t.clone().contiguous() for key, t in tensors.items()}, folder / name)
    return folder

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """place() makes an empty folder, whose name is not ASCII."""
    return lambda: tmp_path_factory.mktemp('模型 e\u0301')

@pytest.fixture(scope='module')
def whole(place):
    """whole(family): config.json and tensors as transformers writes them, to be changed."""
    torch.manual_seed(0)
    made = {}
    for family in MODELS:
        folder = place()
        reference(family).save_pretrained(folder)
        made[family] = read(folder)
    return lambda family: tuple(map(dict, made[family]))

def refuses(path, *words):
    """load(path) raises one line that has these words."""
    with pytest.raises((ValueError, OSError)) as error:
        load(path)
    for word in words:
        assert str(word) in one_line(error), f'{word} should stand in: {error.value}'

def run_main(capsys, main, *flags):
    """The lines that a script prints on standard output; it must end well."""
    capsys.readouterr()
    try:
        main([*map(str, flags), '--device', 'cpu'] if main is not prepare_data.main else
             [*map(str, flags)])
    except SystemExit as e:
        assert not e.code, capsys.readouterr()
    return capsys.readouterr().out.removesuffix('\n').split('\n')

# -----------------------------------------------------------------------------
# The same logits and the same loss, there and back

bools, few = st.booleans(), st.integers(1, 3)
rows = st.lists(st.integers(2, T), min_size=1, max_size=3)  # lengths, before they are padded
options = lambda **values: st.fixed_dictionaries({
    name: st.sampled_from(of) if isinstance(of, list) else of for name, of in values.items()})
ropes = st.one_of(
    options(rope_type=['default'], rope_theta=[100.0, 1e4, 5e5]),
    options(rope_type=['llama3'], rope_theta=[100.0, 1e4], factor=[2.0, 8.0], low_freq_factor=[1.0],
            high_freq_factor=[2.0, 4.0], original_max_position_embeddings=[8, 24, 200]))
CHOICES = {  # sizes of 12 make matrices square: a transposed one would load, and compute nonsense
    'gpt2': options(n_layer=few, n_head=[1, 2, 6], n_inner=[None, 12, 20],
                    activation_function=['gelu_new', 'gelu', 'relu'], scale_attn_weights=bools,
                    layer_norm_epsilon=[1e-5, 1e-2], tie_word_embeddings=bools),
    'bert': options(num_hidden_layers=few, num_attention_heads=[1, 2, 6], type_vocab_size=few,
                    intermediate_size=[12, 20], hidden_act=['gelu', 'gelu_new', 'relu'],
                    layer_norm_eps=[1e-12, 1e-2], tie_word_embeddings=bools),
    't5': options(num_layers=few, num_heads=few, d_kv=st.integers(3, 6), d_ff=[12, 20],
                  layer_norm_epsilon=[1e-6, 1e-2], tie_word_embeddings=bools,
                  feed_forward_proj=['relu', 'gelu', 'gated-gelu', 'gated-silu'],
                  relative_attention_num_buckets=[4, 9, 32],
                  relative_attention_max_distance=[18, 128]),
    'llama': options(num_hidden_layers=few, num_attention_heads=[6, 12], attention_bias=bools,
                     mlp_bias=bools, num_key_value_heads=[1, 2, 6], head_dim=[None, 2, 10],
                     hidden_act=['silu', 'gelu_pytorch_tanh'], rms_norm_eps=[1e-6, 1e-2],
                     tie_word_embeddings=bools, rope_parameters=ropes),
    'mistral': options(num_hidden_layers=few, num_key_value_heads=[1, 2, 6], head_dim=[None, 10],
                       sliding_window=[None, 1, 2, 7, T - 1, T, 4096], tie_word_embeddings=bools,
                       rope_parameters=ropes),
}

def padded(lengths):
    """attention_mask (B, T) of rows with these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

def batch_of(family, lengths, segments):
    """(inputs of transformers, inputs of our model): the same ids, mask and targets."""
    mask = padded(lengths)
    ids, B = torch.randint(V, mask.shape), len(lengths)
    theirs, ours = {'attention_mask': mask.long()}, {'attention_mask': mask}
    if family == 't5':
        targets = torch.randint(V, (B, 7))
        targets[0, 4:] = IGNORE_INDEX  # the padding of a shorter target
        theirs['labels'] = targets
        start = torch.zeros(B, 1, dtype=torch.long)
        ours |= {'targets': targets,
                 'decoder_ids': torch.cat([start, targets[:, :-1].clamp(min=0)], dim=1)}
    elif family == 'bert':
        targets = ids.masked_fill(~mask | (torch.rand(ids.shape) < 0.5), IGNORE_INDEX)
        targets[:, 1] = ids[:, 1]
        follows = torch.randint(2, (B,))
        theirs |= {'token_type_ids': torch.randint(segments, ids.shape), 'labels': targets,
                   'next_sentence_label': 1 - follows}  # class 0 is "is next" there
        ours |= {'segments': theirs['token_type_ids'], 'targets': targets, 'next_targets': follows}
    else:  # transformers shifts the labels of a decoder by itself
        theirs['labels'] = ids.masked_fill(~mask, IGNORE_INDEX)
        nothing = torch.full((B, 1), IGNORE_INDEX)
        ours['targets'] = torch.cat([theirs['labels'][:, 1:], nothing], dim=1)
    return {'input_ids': ids, **theirs}, {'ids': ids, **ours}

@every_family
@some(15)
@given(data=st.data(), lengths=rows)
def test_logits_and_loss_are_those_of_transformers_there_and_back(family, data, lengths, place):
    """A folder opens with the logits and loss it had, and its export is the same model again."""
    theirs, folder, back = reference(family, **data.draw(CHOICES[family])), place(), place()
    theirs.save_pretrained(folder)
    model, checkpoint = load(folder)
    model.eval()
    assert checkpoint['new'] == checkpoint['not_read'] == []
    assert checkpoint['dropped'] in ([], ['cls.predictions.bias'])  # a copy, where it is not tied
    inputs, ours = batch_of(family, lengths, getattr(theirs.config, 'type_vocab_size', 1))
    mask = slice(None) if family == 't5' else ours['attention_mask']
    with torch.no_grad():
        expected, (logits, loss) = theirs(**inputs), model(**ours)
        if family == 'bert':
            known = {key: ours[key] for key in ('ids', 'segments', 'attention_mask')}
            logits = model(**known)[0]
            is_next = model(**known, next_targets=ours['next_targets'])[0]
            close(is_next.flip(1), expected.seq_relationship_logits, 1e-4)
    right = expected.prediction_logits if family == 'bert' else expected.logits
    close(logits[mask], right[mask], 1e-4)
    close(loss, expected.loss, 1e-4)

    export_huggingface(model, back, bos_token_id=3, decoder_start_token_id=0)
    again, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values()) and again.config.bos_token_id == 3, info
    with torch.no_grad():
        found = again.eval()(**inputs)
    same(found.prediction_logits if family == 'bert' else found.logits, right)
    for ours, theirs in zip(load(back)[0].parameters(), model.parameters(), strict=True):
        same(ours, theirs)

LABELS = ['好评', '🙂', *(f'L{i}' for i in range(2, 11)), '']  # '10' must not stand before '2'
HEADS = {'transform', 'transform_norm', 'output'}
BERTS = {  # class: (task, weights that the folder lacks)
    'BertForMaskedLM': ('', {'pooler', 'nsp_head'}), 'BertModel': ('', {'nsp_head', *HEADS}),
    'BertForNextSentencePrediction': ('', HEADS),
    'BertForSequenceClassification': ('classify', {'nsp_head', *HEADS}),
    'BertForTokenClassification': ('tag', {'pooler', 'nsp_head', *HEADS}),
    'BertForQuestionAnswering': ('qa', {'pooler', 'nsp_head', *HEADS})}

@pytest.mark.parametrize('name', BERTS)
def test_every_head_of_bert_answers_as_in_transformers(name, place):
    """Labels keep their order, what the folder lacks is listed as new, and the export answers."""
    task, new = BERTS[name]
    labelled = task in ('classify', 'tag')
    named = {'id2label': dict(enumerate(LABELS)), 'label2id': {}} if labelled else {}
    theirs, folder, back = reference('bert', name, **named), place(), place()
    theirs.save_pretrained(folder)
    model, checkpoint = load(folder)
    assert checkpoint['labels'] == (LABELS if named else []) and model.config.task == task
    assert {key.removeprefix('trunk.').split('.')[0] for key in checkpoint['new']} == new
    model.eval()
    mask, ids, segments = padded([9, 6, 2]), torch.randint(V, (3, 9)), torch.randint(2, (3, 9))
    inputs = {'input_ids': ids, 'attention_mask': mask.long(), 'token_type_ids': segments}
    ours = {'ids': ids, 'attention_mask': mask, 'segments': segments}

    def answers(theirs, model):
        with torch.no_grad():
            out, logits = theirs.eval()(**inputs), model.eval()(**ours)[0]
            if task == 'qa':
                real = mask[:, None].expand(3, 2, 9)
                return logits[real], torch.stack([out.start_logits, out.end_logits], dim=1)[real]
            if name == 'BertModel':
                x = model.hidden(**ours)
                close(model.pool(x), out.pooler_output, 1e-4)
                return x[mask], out.last_hidden_state[mask]
            if name == 'BertForNextSentencePrediction':
                is_next = model(**ours, next_targets=torch.zeros(3, dtype=torch.long))[0]
                return is_next.flip(1), out.logits
            return (logits, out.logits) if task == 'classify' else (logits[mask], out.logits[mask])

    close(*answers(theirs, model), 1e-4)
    export_huggingface(model, back, **named)
    auto = type(theirs) if task else transformers.BertForPreTraining
    again, info = auto.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    if task:
        close(*answers(again, load(back)[0]), 1e-4)
    assert load(back)[1]['labels'] == checkpoint['labels']

COPIES = {  # tensors that older files hold besides: constants, and copies of tied weights
    'gpt2': {'h.0.attn.bias': (1, 1, T, T), 'h.1.attn.masked_bias': ()},
    'bert': {'embeddings.position_ids': (1, T), 'cls.predictions.decoder.weight': (V, 12)},
    't5': {'encoder.embed_tokens.weight': (V, 12), 'decoder.block.0.layer.1.EncDecAttention.'
           'relative_attention_bias.weight': (32, 2)},
    'llama': {'layers.0.self_attn.rotary_emb.inv_freq': (2,)}}

@pytest.mark.parametrize('family', COPIES)
def test_old_files_shards_and_halves_are_the_same_model(family, whole, place):
    """Names without a prefix and BERT's of 2018 open, copies are listed as dropped, float16 too."""
    about, tensors = whole(family)
    old = {re.sub(r'^(transformer|bert|model)\.', '', name): t for name, t in tensors.items()}
    for name in [name for name in old if family == 'bert' and 'LayerNorm' in name]:
        new = name.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')
        old[new] = old.pop(name)
    found, checkpoint = load(write(place(), about, old | {
        name: torch.zeros(shape) for name, shape in COPIES[family].items()}))
    assert checkpoint['dropped'] == sorted(COPIES[family]) and checkpoint['new'] == []
    folder, names = place(), sorted(tensors)
    for i in range(2):
        write(folder, about, {name: tensors[name] for name in names[i::2]}, f'{i}.safetensors')
    put(folder, 'model.safetensors.index.json', {
        'weight_map': {name: f'{i % 2}.safetensors' for i, name in enumerate(names)}})
    halves = {name: t.half() for name, t in tensors.items()}
    model = load(write(place(), about, tensors))[0]
    rounded = load(write(place(), about, {name: t.float() for name, t in halves.items()}))[0]
    half = load(write(place(), about, halves))[0]
    for a, b in ((model, found), (model, load(folder)[0]), (rounded, half)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.dtype == q.dtype == torch.float32
            same(p, q)

HUB = {  # what config.json of well-known models says besides sizes
    'gpt2': {'n_ctx': 1024, 'summary_type': 'cls_index', 'n_special': 0,
             'predict_special_tokens': True, 'task_specific_params': {'text-generation': {}}},
    'gpt2 bare': {'_num_labels': 1, 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}},
    'bert': {'architectures': ['BertForPreTraining'], 'directionality': 'bidi', 'pooler_type':
             'first_token_transform', 'position_embedding_type': 'absolute'},
    't5': {'architectures': ['T5WithLMHeadModel'], 'output_past': True, 'is_encoder_decoder': True},
    't5 flan': {'dense_act_fn': 'gelu_new', 'feed_forward_proj': 'gated-gelu', 'is_gated_act': True,
                'tie_word_embeddings': False, 'classifier_dropout': 0.0},
    'llama 1': {'max_sequence_length': 2048, 'torch_dtype': 'float16'},
    'llama 2': {'_name_or_path': 'x/y', 'attention_bias': False, 'eos_token_id': [2, 3],
                'pretraining_tp': 1, 'rope_scaling': None, 'rope_theta': 100.0},
    'llama 3': {'mlp_bias': False, 'rope_theta': 500.0, 'rope_scaling': {
        'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'rope_type': 'llama3',
        'original_max_position_embeddings': 16}},
    'llama smol': {'is_llama_config': True, 'rope_interleaved': False, 'rope_theta': 100000,
                   'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}},
    'mistral 0.1': {'sliding_window': 4, 'author': 'somebody', 'created_date': '2021-04-28'},
}

@pytest.mark.parametrize('name', HUB)
def test_configurations_of_well_known_models_open_with_the_logits_they_mean(name, place, capsys):
    """Fields that describe are passed over, in one line that names those that nobody knows."""
    family = name.split()[0]
    about = {'model_type': family, **MODELS[family][1], **HUB[name]}
    theirs = getattr(transformers, MODELS[family][0])
    theirs, folder = wide(theirs(theirs.config_class.from_dict(dict(about)))), place()
    theirs.save_pretrained(folder)
    write(folder, about, read(folder)[1])
    capsys.readouterr()
    model = sample.open_model(folder)[0].eval()
    said = capsys.readouterr().err
    unknown = {'n_special', 'predict_special_tokens', 'max_sequence_length', 'author'}
    assert all(field in said for field in unknown & HUB[name].keys()), said
    assert said.count('\n') == bool(said)
    inputs, ours = batch_of(family, [T, 9], 2)
    mask = slice(None) if family == 't5' else ours['attention_mask']
    with torch.no_grad():
        out = theirs(**inputs)
        logits = model(**{key: t for key, t in ours.items() if 'targets' not in key})[0]
    close(logits[mask], out.get('logits', out.get('prediction_logits'))[mask], 1e-4)

# -----------------------------------------------------------------------------
# What is refused by name

yarn = {'rope_type': 'yarn', 'factor': 2.0, 'rope_theta': 1e4}
REFUSED = [  # family, field, a value with an effect that is not computed here
    ('gpt2', 'activation_function', 'silu'), ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gpt2', 'add_cross_attention', True), ('gpt2', 'architectures', ['GPT2ForTokenClassification']),
    ('gpt2', 'attention_sinks', 4), ('gpt2', 'model_type', 'gpt_neox'), ('gpt2', 'n_layer', 0),
    ('gpt2', 'n_layer', '2'), ('gpt2', 'model_type', None), ('gpt2', 'n_positions', -1),
    ('bert', 'hidden_act', 'silu'), ('bert', 'is_decoder', True),
    ('bert', 'position_embedding_type', 'relative_key'),
    ('bert', 'problem_type', 'multi_label_classification'),
    ('t5', 'num_decoder_layers', 3), ('t5', 'feed_forward_proj', 'gated-relu'),
    ('t5', 'architectures', ['T5EncoderModel']), ('llama', 'hidden_act', 'relu'),
    ('llama', 'partial_rotary_factor', 0.5), ('llama', 'rope_parameters', yarn),
    ('llama', 'rope_parameters', {'rope_type': 'default', 'partial_rotary_factor': 0.5}),
    ('llama', 'quantization_config', {'bits': 4}), ('llama', 'model_type', 'gemma2'),
    ('llama', 'final_logit_softcapping', 30.0), ('mistral', 'num_local_experts', 8),
    ('mistral', 'layer_types', ['full_attention', 'sliding_attention']),
    ('mistral', 'sliding_window', -1)]
OURS = {'n_layer': 'n_layer', 'n_positions': 'block_size', 'sliding_window': 'window'}

@pytest.mark.parametrize('family, field, value', REFUSED, ids=str)
def test_a_field_that_is_not_computed_here_is_refused_by_name(family, field, value, whole, place):
    """A model that silently computes something else is worse than none."""
    about, tensors = whole(family)
    refuses(write(place(), about | {field: value}, tensors), OURS.get(field, field))

def test_a_missing_model_type_and_an_old_rope_scaling_are_refused_by_name(whole, place):
    """The key to add is named where Google's own files lack it, and rope_scaling as it is written."""
    about, tensors = whole('llama')
    del about['rope_parameters']
    old = {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}
    refuses(write(place(), about | old, tensors), 'rope_scaling', 'dynamic')
    del about['model_type']
    refuses(write(place(), about, tensors), 'model_type')

@every_family
@some(6)
@given(data=st.data())
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(family, data, whole, place):
    """Every tensor of a file is accounted for; only a head that a BERT lacks is made new."""
    about, tensors = whole(family)
    name = data.draw(st.sampled_from(sorted(tensors)))
    short, t = re.sub(r'^(transformer|bert|model)\.', '', name), tensors[name]
    short = short.replace('c_attn', 'c_attn.q')  # GPT-2's q, k and v are one matrix
    lacking = write(place(), about, {other: t for other, t in tensors.items() if other != name})
    if short.startswith(('cls.', 'pooler.')):
        assert len(load(lacking)[1]['new']) == 1
    else:
        refuses(lacking, short)
    for other in (t[:-3], t[..., 3:], t[None]):
        refuses(write(place(), about, tensors | {name: other}), short.rpartition('.')[2])
    refuses(write(place(), about, tensors | {'größer': t}), 'größer')

def test_files_that_are_not_there_are_named(whole, place, monkeypatch):
    """A git-LFS pointer, pickled weights and a lone tokenizer.model: one line says what to fetch."""
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n'
    folder = write(place(), *whole('gpt2'))
    (folder / 'tokenizer.json').write_text(pointer)
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert 'tokenizer.json' in one_line(error)
    (folder / 'model.safetensors').write_text(pointer)
    refuses(folder, 'model.safetensors', 'git-LFS')
    (folder / 'model.safetensors').unlink()
    refuses(folder, 'there is no', 'model.safetensors')
    (folder / 'pytorch_model.bin').write_bytes(b'')
    refuses(folder, 'pytorch_model.bin', 'safetensors')
    (folder / 'tokenizer.json').rename(folder / 'tokenizer.model')
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert 'tokenizer.json' in one_line(error)
    found, names = write(place(), *whole('gpt2')), []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download',
                        lambda name, **_: names.append(name) or str(found))
    assert load('somebody/gpt2')[0].config.vocab_size == V and names == ['somebody/gpt2']
    monkeypatch.undo()  # now the hub cannot be reached
    refuses('somebody/gpt2', 'https://huggingface.co/somebody/gpt2')

@pytest.mark.parametrize('preset, changes, named', [
    ('nano', {}, 'norm_weight'), ('palm', {}, 'parallel'), ('transformer', {}, 'norm_first'),
    ('lstm', {}, 'arch'), ('gpt2', {'window': '5'}, 'window'), ('gpt2', {'n_kv_head': 2}, 'n_kv'),
    ('llama', {'window': '5 0'}, 'window'), ('t5', {'bias': True}, 'bias'),
    ('llama', {'qk_norm': True}, 'qk_norm'), ('gpt2', {'task': 'qa'}, 'task=qa')])
def test_what_no_class_computes_is_not_exported(preset, changes, named, place):
    """The choice that is in the way is named, nothing is written, and a full folder stays as it is."""
    sizes = dict(vocab_size=V, block_size=T, n_layer=1, n_head=4, n_embd=16, head_dim=4, mlp_dim=24)
    model, folder = build(dataclasses.replace(PRESETS[preset], **sizes | changes)), place()
    with pytest.raises(ValueError, match=named) as error:
        export_huggingface(model, folder / 'new')
    assert one_line(error) and not (folder / 'new').exists()
    (folder / 'notes').touch()
    with pytest.raises(ValueError, match='not empty'):
        export_huggingface(build(dataclasses.replace(PRESETS['gpt2'], **sizes)), folder)
    assert os.listdir(folder) == ['notes']

# -----------------------------------------------------------------------------
# Folders with a tokenizer

LINES = ['The cat sat on the mat. It is the end of the tale.', '床前明月光，疑是地上霜。',
         "Café déjà vu, it's 10 o'clock!", 'the dog and the cat: who won? The dog won.']
WORDS = ['the', 'The', 'CATS', 'Café', 'cafe\u0301', 'İ', '床前', '👋🏽', '❤\ufe0f', "it's", '10', 'ﬁ',
         'zebra', ' ', '  ', '\n', '\t', '\u3000', '.', '，', '\u200d', '<|endoftext|>', '[SEP]', '<s>']
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=10).map(''.join)
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
SEEN = sorted(set(''.join(LINES).lower()) - {*LETTERS, ' '})

def learn(*parts, **choices):
    """Vocabulary and merges of a small BPE."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = parts
    trainer = hf.trainers.BpeTrainer(show_progress=False, **choices)
    tokenizer.train_from_iterator(LINES * 3, trainer)
    model = json.loads(tokenizer.to_str())['model']
    return model['vocab'], [tuple(pair) for pair in model['merges']]

def write_gpt2(folder):
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = learn(hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
                          hf.normalizers.Sequence([]), vocab_size=300, initial_alphabet=alphabet)
    put(folder, 'vocab.json', vocab | {'<|endoftext|>': len(vocab)})
    put(folder, 'merges.txt', '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges))

def write_bert(folder):
    put(folder, 'vocab.txt', '\n'.join([
        '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *SEEN, *LETTERS, *(f'##{c}' for c in LETTERS),
        'the', 'cat', 'dog', 'won', 'cafe', '##he', '床前', '##é', 'T', 'C', '##A', '##T']) + '\n')

def write_t5(folder):
    """SentencePiece as T5 has it: <pad>, </s> and <unk> first, the sentinels last."""
    pieces = ['<pad>', '</s>', '<unk>', '▁', '▁the', 's', '▁cat', '▁dog', 'é', '明月', *SEEN, *LETTERS]
    scores = [0.0, 0.0, 0.0, *(-2 - 0.25 * i for i in range(len(pieces)))]
    tokenizer = hf.Tokenizer(hf.models.Unigram([*dict(zip(pieces, scores)).items()], unk_id=2))
    tokenizer.normalizer = hf.normalizers.NFKC()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Metaspace()
    tokenizer.add_special_tokens(pieces[:3] + [f'<extra_id_{i}>' for i in range(99, -1, -1)])
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', 1)])
    put(folder, 'tokenizer.json', tokenizer.to_str())
    put(folder, 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>', 'pad_token': '<pad>',
        'unk_token': '<unk>'})

def write_llama(folder):
    """SentencePiece as Llama has it: <s> begins a text, and unknown characters become bytes."""
    normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend('▁'),
                                          hf.normalizers.Replace(' ', '▁')])
    learned, merges = learn(hf.pre_tokenizers.Sequence([]), normalizer, vocab_size=110)
    vocab = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *learned]
    tokenizer = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(vocab)}, merges,
                                           unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = hf.decoders.Sequence([
        hf.decoders.Replace('▁', ' '), hf.decoders.ByteFallback(), hf.decoders.Fuse(),
        hf.decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens(vocab[:3])
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
    put(folder, 'tokenizer.json', tokenizer.to_str())
    put(folder, 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>',
        'unk_token': '<unk>'})

WRITE = {'gpt2': write_gpt2, 'bert': write_bert, 't5': write_t5, 'llama': write_llama}
CLASSES = {'gpt2': 'GPT2LMHeadModel', 'bert': 'BertForMaskedLM',
           't5': 'T5ForConditionalGeneration', 'llama': 'LlamaForCausalLM'}

@pytest.fixture(scope='module')
def folders(place):
    """{name: a folder with tokenizer and model}; the table of a model has rows without a token."""
    torch.manual_seed(0)
    found = {}
    for family, fill in WRITE.items():
        folder = found[family] = place()
        fill(folder)
        size = load_tokenizer(folder).n_vocab + 3
        longest = {'bert': 'max_position_embeddings', 'llama': 'max_position_embeddings'}
        model = reference(family, CLASSES[family], vocab_size=size,
                          **{longest.get(family, 'n_positions'): 96})
        if family == 'llama':  # no text of single bytes, which are no characters
            model.lm_head.weight.data[3:259] = 0
        model.save_pretrained(folder)
    for family in ('gpt2', 'bert'):
        folder = found[f'{family} tokenizer.json'] = place()
        shutil.copytree(found[family], folder, dirs_exist_ok=True)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / ('vocab.json' if family == 'gpt2' else 'vocab.txt')).unlink(missing_ok=True)
    found['bert cased'] = place()
    shutil.copytree(found['bert'], found['bert cased'], dirs_exist_ok=True)
    put(found['bert cased'], 'tokenizer_config.json', {
        'do_lower_case': False, 'tokenize_chinese_chars': False, 'tokenizer_class': 'BertTokenizer'})
    return found

@pytest.mark.parametrize('name', [*WRITE, 'gpt2 tokenizer.json', 'bert tokenizer.json', 'bert cased'])
def test_ids_offsets_and_text_are_those_of_transformers(name, folders, capsys):
    """For any text; what a tokenizer is survives the way through JSON."""
    ours = load_tokenizer(folders[name])
    again = prepare_data.Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])

    @some(40)
    @given(texts)
    @example('  The Café 床前 cats 👋🏽\n\ne\u0301 ﬁ')
    def check(text):
        right = theirs(text, add_special_tokens=False, return_offsets_mapping=True,
                       split_special_tokens=True)
        ids, offsets = ours.encode_with_offsets(text)
        assert ids.tolist() == right['input_ids'] == ours.encode(text).tolist(), text
        assert again.encode(text).tolist() == ids.tolist()
        assert [tuple(pair) for pair in offsets.tolist()] == right['offset_mapping'], text
        assert ours.decode(ids) == theirs.decode(right['input_ids']), text
    check()
    written = ours.encode('the <s> cat</s> [SEP] <|endoftext|> <pad>[MASK] <extra_id_0> sat').tolist()
    unknown = theirs.unk_token_id if name != 'gpt2' else None  # a special token in a text is text
    assert not {*written} & ({*theirs.all_special_ids, *ours.special.values()} - {unknown})

def special_ids(theirs, size):
    """Ids that are no text: special tokens, and rows without a token."""
    added = [i for i, token in theirs.added_tokens_decoder.items() if token.special]
    return {*theirs.all_special_ids, *added, *range(max(theirs.get_vocab().values()) + 1, size)}

def new_ids(model, theirs, ids, ends):
    """What transformers' generate() writes, without its end."""
    hidden = sorted(special_ids(theirs, model.config.vocab_size) - ends)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0,
                         suppress_tokens=hidden, eos_token_id=sorted(ends) or None)[0].tolist()
    new = out[1:] if model.config.is_encoder_decoder else out[len(ids):]
    return new[:next((n for n, i in enumerate(new) if i in ends), len(new))]

@pytest.mark.parametrize('family', ['gpt2', 'llama', 't5'])
@some(8)
@given(data=st.data())
def test_greedy_text_is_that_of_generate_and_stops_where_it_stops(family, data, folders, place, capsys):
    """A text ends at each id that generation_config.json, config.json or the tokenizer names."""
    folder = shutil.copytree(folders[family], place() / 'copy')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, CLASSES[family]).from_pretrained(folder)
    words = st.lists(st.sampled_from([w for w in WORDS if w.strip()]), min_size=1, max_size=4)
    prompt = ' '.join(data.draw(words))
    ids = theirs(prompt, split_special_tokens=True)['input_ids']
    ends = {theirs.eos_token_id}
    longest = new_ids(model, theirs, ids, ends)
    for name in ('generation_config.json', 'config.json'):
        end = data.draw(st.sampled_from([None, *longest[2:]]))
        saved = json.loads((folder / name).read_text())
        put(folder, name, saved | {'eos_token_id': data.draw(st.sampled_from([end, [end]]))
                                   if end else None})
        ends |= {end} - {None}
    new = new_ids(model, theirs, ids, ends)
    flags = ['--init_from', folder, f'--start={prompt}', '--max_new_tokens', 12, '--json']
    if family != 't5':
        flags += ['--temperature', 0]
    [line] = run_main(capsys, sample.main, *flags)
    if family == 't5':
        assert json.loads(line)['targets'][0]['text'].strip() == theirs.decode(new).strip()
    else:
        assert json.loads(line)['text'] == theirs.decode(ids + new)[len(theirs.decode(ids)):]

def test_masks_are_filled_with_what_transformers_finds_likeliest(folders, capsys):
    """The five best of each [MASK] with their probabilities, special tokens left out."""
    theirs = transformers.AutoTokenizer.from_pretrained(folders['bert'])
    model = transformers.BertForMaskedLM.from_pretrained(folders['bert'])
    for start in ('The [MASK] sat on [MASK].', '床 ||| the [MASK]'):
        inputs = theirs(*start.split(' ||| '), return_tensors='pt')
        with torch.no_grad():
            logits = model(**inputs).logits[0][inputs['input_ids'][0] == theirs.mask_token_id]
        logits[:, sorted(special_ids(theirs, logits.size(1)))] = -torch.inf
        p, best = logits.softmax(dim=-1).topk(5)
        [line] = run_main(capsys, sample.main, '--init_from', folders['bert'], '--start', start, '--json')
        found = json.loads(line)['guesses']
        assert [[text for text, _ in row] for row in found] == [
            [theirs.decode([i]) for i in row] for row in best.tolist()]
        close(torch.tensor([[value for _, value in row] for row in found]), p)

@pytest.fixture(scope='session')
def tiny(shared, tmp_path_factory):
    """The folders t-... of shared/tools/tiny_folders.py."""
    here, folder = os.getcwd(), tmp_path_factory.mktemp('tiny')
    os.chdir(folder)
    try:
        runpy.run_path(str(shared / 'tools' / 'tiny_folders.py'))
    finally:
        os.chdir(here)
    return folder

@pytest.mark.parametrize('name, ends', [('t-added', [257]), ('t-eos', [257]), ('t-named', [256]),
                                        ('t-llama', [257, 258])])
def test_the_end_of_a_folder_is_the_one_that_its_files_name(name, ends, tiny, capsys):
    """Added tokens, an end that is not called <|endoftext|>, and several ends."""
    assert sorted(load_tokenizer(tiny / name).end_ids) == ends
    flags = ['--init_from', tiny / name, '--start', 'Hi', '--temperature', 0, '--json']
    [line] = run_main(capsys, sample.main, *flags)
    assert name == 't-named' or json.loads(line) == {'prompt': 'Hi', 'text': ''}

@pytest.mark.parametrize('name, words', [
    ('t-nan', ['transformer.h.0.mlp.c_fc.weight', 'NaN']), ('t-regression', ['regression']),
    ('t-japanese', ['tokenizer_class', 'BertJapaneseTokenizer']), ('t-shards', ['.bin'])])
def test_a_folder_that_means_something_else_is_refused(name, words, tiny, capsys):
    """Weights that are not finite, a regression, another tokenizer class, pickled shards."""
    with pytest.raises(ValueError) as error:
        sample.main(['--init_from', str(tiny / name), '--start', 'the [MASK]'])
    assert all(word in one_line(error) for word in words), error.value

@some(60)
@given(data=st.data())
def test_a_damaged_file_is_one_line_never_a_traceback(data, folders, place):
    """Bytes flipped or cut off in any file of a folder: it opens, or says in one line why not."""
    source = folders[data.draw(st.sampled_from(sorted(folders)))]
    name = data.draw(st.sampled_from(sorted(os.listdir(source))))
    folder = shutil.copytree(source, place() / 'copy')
    damaged = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, min(len(damaged), 3000) - 1))
    if data.draw(bools):
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[at:]
    (folder / name).write_bytes(damaged)
    try:
        sample.open_model(folder)
    except (ValueError, OSError) as e:
        assert str(e) and '\n' not in str(e), f'{name} at {at}: {e!r}'

# -----------------------------------------------------------------------------
# Out by command, and fine-tuning

BPE = prepare_data.bpe_tokenizer(LINES * 3, 420)

def trained(folder, preset, tokenizer, task='', labels=()):
    """A checkpoint as train.py leaves it."""
    config = dataclasses.replace(
        PRESETS[preset], vocab_size=tokenizer.n_vocab, block_size=32, n_layer=2, n_head=2,
        n_embd=16, head_dim=8, mlp_dim=24, task=task, n_labels=len(labels))
    model = wide(build(config))
    save(folder / 'ckpt.pt', model, tokenizer=tokenizer.to_dict(), task=task, labels=list(labels))
    return model

@pytest.mark.parametrize('preset', ['gpt2', 'llama', 't5', 'bert'])
@pytest.mark.parametrize('tokenizer', [BPE, prepare_data.byte_tokenizer()], ids=['bpe', 'byte'])
def test_an_exported_folder_is_the_same_in_transformers(preset, tokenizer, place, capsys):
    """AutoModel and AutoTokenizer give the same ids, logits and greedy text; load() the same bits."""
    out, folder = place(), place() / 'new'
    model = trained(out, preset, tokenizer)
    run_main(capsys, sample.main, '--out_dir', out, '--export', folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    auto = {'t5': 'AutoModelForSeq2SeqLM', 'bert': 'AutoModelForPreTraining'}
    auto = getattr(transformers, auto.get(preset, 'AutoModelForCausalLM'))
    there, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    back, again = load(folder)[0], load_tokenizer(folder)
    for text in [*LINES, '  the\n\ncat 床👋', '']:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)['input_ids'] == ids == again.encode(text).tolist()
        assert theirs.decode(ids) == text == again.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.end_id, tokenizer.pad_id)
    assert there.config.eos_token_id == tokenizer.end_id == again.end_id
    for name, p in model.state_dict().items():
        same(back.state_dict()[name], p)
    ids = tokenizer.encode('the cat').tolist()
    if preset == 'bert':
        with torch.no_grad():
            close(there(torch.tensor([ids])).prediction_logits, model(torch.tensor([ids]))[0], 1e-4)
        return
    flags = ['--out_dir', out, '--start', 'the cat', '--max_new_tokens', 12, '--json']
    [line] = run_main(capsys, sample.main, *flags, *['--temperature', 0] * (preset != 't5'))
    source = [*ids, tokenizer.end_id] if preset == 't5' else ids
    right = theirs.decode(new_ids(there, theirs, source, {tokenizer.end_id}))
    found = json.loads(line)
    assert (found['targets'][0]['text'] if preset == 't5' else found['text']).strip() == right.strip()

def test_a_bert_folder_is_tuned_resumed_asked_and_exported_by_command(folders, place, tmp_path):
    """prepare_data.py, train.py and sample.py: tokenizer and labels go all the way."""
    put(tmp_path, 'rows.tsv', ''.join(f'yes\tthe cat {i}\n不\t床前 {i}\n' for i in range(12)))
    run = lambda script, *flags: command(script, *flags, cwd=tmp_path).stdout
    run('prepare_data.py', '--task', 'classify', '--input', 'rows.tsv', '--tokenizer',
        folders['bert'], '--out_dir', 'rows', '--block_size', 48)
    run('train.py', '--init_from', folders['bert'], '--dataset', 'rows', '--out_dir', 'out',
        '--max_iters', 20, '--eval_interval', 20, '--batch_size', 8, '--device', 'cpu')
    run('sample.py', '--out_dir', 'out', '--export', 'new')
    asked = run('sample.py', '--init_from', 'new', '--start', 'the cat', '--json')
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'new')
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')('the cat', return_tensors='pt')
    with torch.no_grad():
        p = auto(**inputs).logits[0].softmax(dim=-1)
    assert json.loads(asked)['label'] == auto.config.id2label[p.argmax().item()]
    assert abs(json.loads(asked)['probability'] - p.max().item()) < 1e-4
    line = refused('train.py', '--init_from', folders['llama'], '--dataset', 'rows', cwd=tmp_path)
    assert 'another tokenizer' in line

def test_rows_added_to_gpt2_are_never_sampled_and_never_exported(shared, place, tmp_path, capsys):
    """Fine-tuning adds rows for [SEP] and its like; the old rows stay, and export leaves them out."""
    gpt2 = reference('gpt2', vocab_size=50257, n_embd=4)
    gpt2.save_pretrained(tmp_path / 'gpt2')
    put(tmp_path, 'rows.tsv', ''.join(f'the {i}\tcat {i}\n' for i in range(20)))
    run_main(capsys, prepare_data.main, '--task', 'seq2seq', '--input', tmp_path / 'rows.tsv',
             '--tokenizer', 'gpt2', '--out_dir', tmp_path / 'rows', '--block_size', T)
    lines = run_main(capsys, train.main, '--init_from', tmp_path / 'gpt2', '--dataset',
                     tmp_path / 'rows', '--out_dir', tmp_path / 'out', '--max_iters', 0)
    assert any('rows added to its vocabulary' in line for line in lines), lines
    model, _, tokenizer = sample.open_model(tmp_path / 'out')
    assert model.config.vocab_size == tokenizer.n_vocab > tokenizer.id('[SEP]') >= 50257
    model.tokens.weight.data[50257:] = 50 * model.tokens.weight.data[random.Random(0).randrange(9)]
    save(tmp_path / 'out' / 'best.pt', model, tokenizer=tokenizer.to_dict(), task='', labels=[])
    [line] = run_main(capsys, sample.main, '--out_dir', tmp_path / 'out', '--start', 'the', '--json',
                      '--temperature', 1)
    assert not any(name in line for name in tokenizer.special if name != '<|endoftext|>')
    run_main(capsys, sample.main, '--out_dir', tmp_path / 'out', '--export', tmp_path / 'new')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'new')
    same(back.state_dict()['transformer.wte.weight'], gpt2.state_dict()['transformer.wte.weight'])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'new')
    assert len(theirs) == 50257 and theirs('the cat 床')['input_ids'] == tokenizer.encode(
        'the cat 床').tolist()
