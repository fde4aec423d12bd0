"""Models of text: golden values, padding, streaming, wrong input."""
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from golden_values import SEQUENCE_GOLDEN, check_gradients, read_golden

from ls_vision.compat import TransformerLSModel
from ls_vision.models.language_model import LanguageModel
from ls_vision.models.sequence_classifier import SequenceClassifier, TwoTextClassifier


@pytest.mark.parametrize('path', sorted(SEQUENCE_GOLDEN.glob('classifier*')), ids=lambda p: p.stem)
def test_golden_classifiers(path):
    meta, tensors = read_golden(path)
    kind = TwoTextClassifier if meta['dual'] == 'True' else SequenceClassifier
    model = kind(
        int(meta['classes']), int(meta['dim']), int(meta['inner_dim']), vocab_size=int(meta['vocab']),
        max_length=int(meta['max_seq_len']), depth=int(meta['num_layers']), num_heads=int(meta['num_heads']),
        window_size=int(meta['window']), rank=int(meta['rank']), pooling=meta['mode'])
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith('param.')}
    assert set(parameters) == set(model.state_dict())
    model.load_state_dict(parameters)
    logits = model(*(tensors[key] for key in ('input_ids_0', 'input_ids_1') if key in tensors))
    loss = F.cross_entropy(logits, tensors['label'], reduction='none')
    loss.mean().backward()
    assert (logits - tensors['logits']).abs().max() < 1e-4 and (loss - tensors['loss']).abs().max() < 1e-4
    check_gradients(model, tensors, vanishing='dconv_fc.bias', unused=meta['unused'].split())


def test_golden_language_model():
    meta, tensors = read_golden(SEQUENCE_GOLDEN / 'lm_pre_gelu.safetensors')
    model = TransformerLSModel(
        int(meta['vocab']), int(meta['dim']), int(meta['inner_dim']), int(meta['num_heads']), int(meta['num_layers']),
        int(meta['memory']), 0., int(meta['rank']), int(meta['chunk']), int(meta['window']), 0.,
        meta['use_bias'] == 'True', meta['pre_ln'] == 'True', meta['gelu'] == 'True', False, int(meta['clamp_len']),
        int(meta['cpos_clamp_len']))
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith('param.')}
    missing = model.load_state_dict(parameters, strict=False)
    assert set(missing.missing_keys) == {'out_emb.weight', 'pos_emb.inv_freq'} and not missing.unexpected_keys
    memory = [torch.zeros(2, int(meta['memory']), model.dim) for _ in model.layers]
    for segment in range(3):
        tokens = tensors[f'segment{segment}.tokens']
        log_probs, memory, _ = model(tokens, memory)
        loss = F.nll_loss(log_probs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum') / tokens.numel()
        assert (log_probs - tensors[f'segment{segment}.log_probs']).abs().max() < 1e-4
        assert (loss - tensors[f'segment{segment}.loss']).abs() < 1e-4
        for layer, kept in enumerate(memory):
            assert (kept - tensors[f'segment{segment}.memory.{layer}']).abs().max() < 1e-4
        if meta['grad_of'] == f'segment{segment}.loss':
            loss.backward()
            check_gradients(model, tensors, vanishing='dconv_1.bias')


@pytest.mark.parametrize('make,count', [
    (lambda: SequenceClassifier(10, max_length=2048), 249_418),
    (lambda: SequenceClassifier(10, max_length=2048, window_size=16, rank=2), 241_618),
    (lambda: SequenceClassifier(2, max_length=4096), 379_458),
    (lambda: TwoTextClassifier(2, max_length=4096), 404_034),
    (lambda: TwoTextClassifier(2, max_length=4096, window_size=1, rank=254), 461_754),
    (lambda: LanguageModel(208), 44_294_448),
    (lambda: LanguageModel(32), 44_204_160),
])
def test_parameter_counts(make, count):
    with torch.device('meta'):
        assert sum(p.numel() for p in make().parameters()) == count


@pytest.mark.parametrize('pooling', ['cls_last_layer', 'cls_token'])
def test_padding_makes_no_difference_to_a_classifier(pooling):
    model = SequenceClassifier(3, 16, 32, vocab_size=9, max_length=40, window_size=4, rank=3, pooling=pooling)
    tokens = torch.randint(1, 9, (2, 21))
    torch.testing.assert_close(model(F.pad(tokens, (0, 15))), model(tokens))
    assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()  # a text without a token


def test_mean_pooling_counts_padding():
    model = SequenceClassifier(3, 16, 32, vocab_size=9, max_length=40, window_size=4, rank=3, pooling='mean')
    tokens = torch.randint(1, 9, (2, 20))
    torch.testing.assert_close(model.model(F.pad(tokens, (0, 20))), model.model(tokens) / 2)


@pytest.mark.parametrize('pre_ln', [True, False])
def test_language_model_streams(pre_ln):
    model = LanguageModel(
        11, 16, 2, 2, 32, window_size=8, chunk_size=4, pre_ln=pre_ln, gelu=pre_ln).eval()
    tokens = torch.randint(0, 11, (2, 40))
    states, logits = None, []
    for part in tokens.split([1, 7, 20, 1, 11], dim=1):
        out, states = model(part, states=states)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), rtol=0, atol=1e-5)


def test_generate():
    model = LanguageModel(11, 16, 1, 2, 32, window_size=8, chunk_size=4).eval()
    tokens = torch.randint(0, 11, (2, 6))
    out = model.generate(tokens, 9, temperature=0)
    assert torch.equal(out[:, :6], tokens)
    assert torch.equal(out[:, 6:], model(out)[:, 5:-1].argmax(-1))
    assert model.generate(tokens, 3).shape == (2, 9)
    with pytest.raises(ValueError, match=r'tokens has shape \[2, 0\], expected \(batch, 1 or more\)'):
        model.generate(tokens[:, :0], 1)


def test_generate_from_texts_of_different_lengths():
    model = LanguageModel(20, 16, 2, 2, 32, window_size=8, chunk_size=4, max_chunks=3).eval()
    tokens = torch.randint(0, 20, (2, 30))
    padding = torch.arange(30) < torch.tensor([[0], [13]])
    together = model.generate(tokens, 6, temperature=0, key_padding_mask=padding)
    for row, first in enumerate((0, 13)):
        assert torch.equal(together[row, first:], model.generate(tokens[row:row + 1, first:], 6, temperature=0)[0])
    with pytest.raises(ValueError, match='key_padding_mask is True for the last token of a text'):
        model.generate(tokens, 1, key_padding_mask=~padding)


OPEN = [
    SequenceClassifier(3, vocab_size=20, max_length=90, window_size=4, rank=3),
    LanguageModel(20, 16, 2, 2, 32, window_size=8, chunk_size=4),
    LanguageModel(20, 16, 2, 2, 32, window_size=8, chunk_size=4, max_chunks=3),
    LanguageModel(20, 16, 2, 2, 32, window_size=8, chunk_rank=0)]
OPEN_NAMES = ['classifier', 'language model', 'last chunks', 'window alone']


@pytest.mark.parametrize('model', OPEN, ids=OPEN_NAMES)
def test_exported_model_of_open_length(model):
    model = model.eval()
    example = torch.randint(1, 20, (2, 37))
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim('B', max=64), 1: torch.export.Dim('N', max=90)},))
    for shape in ((1, 64), (5, 2), (3, 90), (2, 1)):
        tokens = torch.randint(0, 20, shape)
        torch.testing.assert_close(program.module()(tokens), model(tokens))


def test_exported_language_model_with_padding():
    model = LanguageModel(20, 16, 2, 2, 32, window_size=8, chunk_size=4).eval()
    length = torch.export.Dim('N', max=90)
    program = torch.export.export(
        model, (torch.randint(1, 20, (2, 37)), torch.rand(2, 37) < .3), dynamic_shapes=({1: length}, {1: length}))
    for n in (3, 64):
        tokens, padding = torch.randint(0, 20, (2, n)), torch.rand(2, n) < .5
        torch.testing.assert_close(program.module()(tokens, padding), model(tokens, padding))


@pytest.mark.slow
@pytest.mark.parametrize('model', OPEN, ids=OPEN_NAMES)
def test_onnx_model_of_open_length(model):
    model = model.eval()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.randint(1, 20, (2, 37)),), dynamo=True, opset_version=20, input_names=['tokens'],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((1, 64), (5, 2), (3, 90)):
        tokens = torch.randint(0, 20, shape)
        found = torch.from_numpy(session.run(None, {'tokens': tokens.numpy()})[0])
        torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize('model', [
    SequenceClassifier(2, vocab_size=9, max_length=30, window_size=4, rank=3),
    LanguageModel(9, 16, 2, 2, 32, window_size=8, chunk_size=4)], ids=['classifier', 'language_model'])
def test_hooks_on_every_module(model):
    tokens, called, differentiated, handles = torch.randint(1, 9, (2, 30)), set(), set(), []
    expected = model(tokens)
    names = {name for name, module in model.named_modules() if not isinstance(module, torch.nn.ModuleList)}
    for name, module in model.named_modules():
        handles += [
            module.register_forward_hook(lambda *args, name=name: called.add(name)),
            module.register_full_backward_hook(lambda *args, name=name: differentiated.add(name))]
    y = model(tokens)
    y.sum().backward()
    for handle in handles:
        handle.remove()
    assert called == differentiated == names
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('call,message', [
    (lambda: SequenceClassifier(2, pooling='max'), "pooling is 'max', expected one of"),
    (lambda: SequenceClassifier(0), 'num_classes is 0, expected 1 or more'),
    (lambda: SequenceClassifier(2, vocab_size=5.5), 'vocab_size is 5.5, expected a whole number of 1 or more'),
    (lambda: SequenceClassifier(2, max_length=0), 'max_length is 0, expected 1 or more'),
    (lambda: small_language_model(depth=0), 'depth is 0, expected 1 or more'),
    (lambda: small_language_model(attentions=[]), 'attentions has 0 layers, expected depth 1 of them'),
])
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def small_language_model(**kwargs):
    return LanguageModel(**{**dict(
        vocab_size=9, dim=16, depth=1, num_heads=2, hidden_dim=32, window_size=8, chunk_size=4), **kwargs})


@pytest.mark.parametrize('call', [SequenceClassifier(2, vocab_size=9, max_length=8), small_language_model()])
@pytest.mark.parametrize('tokens,message', [
    (torch.full((1, 3), 9), 'tokens has numbers from 9 to 9, expected 0 to 8'),
    (torch.full((1, 3), -1), 'tokens has numbers from -1 to -1, expected 0 to 8'),
    (torch.ones(3, dtype=torch.long), r'tokens is torch.int64 \[3\], expected whole numbers \(batch, tokens\)'),
    (torch.ones(1, 3), r'tokens is torch.float32 \[1, 3\], expected whole numbers'),
    ([[1, 2]], 'tokens is list, expected whole numbers'),
])
def test_wrong_tokens(call, tokens, message):
    with pytest.raises(ValueError, match=message):
        call(tokens)


def test_wrong_calls():
    tokens = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match='tokens has 9 of them in a row, expected max_length 8 or fewer'):
        SequenceClassifier(2, max_length=8)(tokens)
    model = small_language_model()
    for states, message in (([], '0 of them'), ('ab', 'a str')):
        with pytest.raises(ValueError, match=f'states is {message}, expected None or the list of 1 of an earlier call'):
            model(tokens, states=states)
    for kwargs, message in (
            (dict(count=1.5), 'count is 1.5, expected a whole number of 0 or more'),
            (dict(count=1, temperature=float('nan')), 'temperature is nan, expected 0 or more')):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, **kwargs)
