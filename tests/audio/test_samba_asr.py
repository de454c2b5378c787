"""Samba-ASR: front end against Whisper's, states against whole sequences, padding, decoding, learning."""

import itertools
import math

import numpy as np
import pytest
import torch

from zoo_audio.decoding import (
    CTCGreedy,
    align,
    ctc_beam,
    ctc_greedy,
    decode_beam,
    decode_greedy,
    heard,
    next_log_probs,
)
from zoo_audio.features import LogMel, LogMelStream
from zoo_audio.samba_asr import SambaASR

OFFLINE = {"vocab_size": 24, "dim": 16, "n_enc": 2, "n_dec": 2, "n_mels": 20, "d_state": 4}
CAUSAL = {**OFFLINE, "bidirectional": False, "scaling": "fixed", "ctc": True, "strides": (2, 2), "mlp": True}


def made(seed=0, **config):
    torch.manual_seed(seed)
    return SambaASR(**config).eval()


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_are_whispers():
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=80)
    audio = np.random.default_rng(0).standard_normal(16000 + 77).astype(np.float32) * 0.1
    audio[4000:9000] *= 1e-4  # quiet enough to be clamped
    expected = extractor._np_extract_fbank_features(audio[None], "cpu")[0].T
    found = LogMel(80)(torch.from_numpy(audio)[None])[0]
    assert found.shape == expected.shape
    assert torch.allclose(found, torch.from_numpy(expected), atol=1e-5)


def test_features_in_pieces_are_those_of_the_whole():
    mel = LogMel(20, scaling="fixed")
    audio = torch.randn(7003, generator=torch.Generator().manual_seed(1)) * 0.1
    for length in (0, 1, 160, 200, 201, 399, 400, 7003):
        whole, stream = mel(audio[None, :length]), LogMelStream(mel)
        cuts = sorted({0, *(c for c in (3, 150, 400, 401, 5000) if c < length), length})
        pieces = [stream.push(audio[a:b]) for a, b in itertools.pairwise(cuts)] + [stream.finish()]
        assert whole.shape[1] == length // 160
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6), length
        assert stream.kept.shape[1] <= 2 * mel.n_fft


def test_recordings_of_unequal_length_are_padded_behind():
    mel = LogMel(20)
    audio = torch.randn(2, 3000, generator=torch.Generator().manual_seed(2))
    both = mel(audio, torch.tensor([3000, 1700]))
    assert torch.allclose(both[1, :10], mel(audio[1:, :1700])[0], atol=1e-6)
    assert not both[1, 10:].any()


def test_loudness_relative_features_do_not_stream():
    with pytest.raises(ValueError, match="cannot be streamed"):
        LogMelStream(LogMel(20))


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [OFFLINE, CAUSAL, {**OFFLINE, "positions": True, "tie": True}])
def test_a_padded_batch_is_its_recordings(config):
    model = made(**config)
    features, frames = torch.randn(3, 45, 20), torch.tensor([45, 30, 13])
    tokens = torch.randint(3, 24, (3, 6))
    with torch.no_grad():
        together = model(features, tokens, frames)
        for i, n in enumerate(frames):
            alone = model(features[i : i + 1, :n], tokens[i : i + 1])
            for name, value in alone.items():
                kept = value.shape[1]
                assert torch.allclose(value[0], together[name][i, :kept], atol=1e-5), (name, i)


@pytest.mark.parametrize("config", [OFFLINE, CAUSAL])
def test_text_step_by_step_is_text_at_once(config):
    model = made(**config)
    features, frames = torch.randn(2, 40, 20), torch.tensor([40, 21])
    tokens = torch.randint(3, 24, (2, 9))
    with torch.no_grad():
        whole = model(features, tokens, frames)["logits"]
        hidden, lengths = model.encode(features, frames)
        state = model.dec.init_state(2)
        model.dec.listen(hidden, state, lengths)
        steps = torch.stack([model.head(model.dec.step(tokens[:, t], state)) for t in range(9)], 1)
    assert torch.allclose(steps, whole, atol=1e-5)


def test_text_sees_all_audio_and_no_later_text():
    model = made(**OFFLINE)
    features, tokens = torch.randn(1, 40, 20), torch.randint(3, 24, (1, 8))
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] - 2) % 21 + 3
    changed = features.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        a, b = model(features, tokens)["logits"], model(features, other)["logits"]
        c = model(changed, tokens)["logits"]
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    assert (a - c)[:, 0].abs().max() > 1e-6


def test_a_causal_encoder_reads_in_pieces():
    model = made(**CAUSAL)
    features = torch.randn(1, 61, 20)
    with torch.no_grad():
        whole, _ = model.encode(features)
        front, state, pieces = model.front.init_state(), model.enc.init_state(), []
        for a, b in itertools.pairwise([0, 1, 1, 4, 5, 30, 61]):
            x = model.front.stream(features[:, a:b], front)
            pieces.append(model.enc(x, state=state) if x.shape[1] else x)
        x = model.front.stream(features[:, :0], front, last=True)
        pieces.append(model.enc(x, state=state) if x.shape[1] else x)
    assert whole.shape[1] == math.ceil(61 / 4)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


def test_what_cannot_be_is_refused():
    for config, message in (
        ({**OFFLINE, "n_dec": 0}, "no way to write text"),
        ({**OFFLINE, "bidirectional": False}, "scaling"),
        ({**OFFLINE, "strides": (1,)}, "strides"),
    ):
        with pytest.raises(ValueError, match=message):
            SambaASR(**config)
    model = made(**OFFLINE)
    with pytest.raises(ValueError, match=r"expected \(batch, frames, 20\)"):
        model.encode(torch.randn(1, 10, 8))
    with pytest.raises(ValueError, match="needs tokens"):
        model(torch.randn(1, 10, 20))
    with pytest.raises(ValueError, match="both directions"):
        model.enc.init_state()


def test_it_learns_an_utterance():
    torch.manual_seed(0)
    model = SambaASR(**{**CAUSAL, "dim": 24})
    features, frames = torch.randn(2, 60, 20), torch.tensor([60, 50])
    tokens, lengths = torch.tensor([[5, 6, 6, 7], [9, 4, 0, 0]]), torch.tensor([4, 2])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model.loss(features, frames, tokens, lengths, ctc_weight=1.0, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    model.eval()
    with torch.no_grad():
        for i in range(2):
            hidden, _ = model.encode(features[i : i + 1, : frames[i]])
            expected = tokens[i, : lengths[i]].tolist()
            assert ctc_greedy(model.ctc(hidden)[0]).tokens == expected
            assert ctc_beam(model.ctc(hidden)[0], 4)[0].tokens == expected
            assert decode_greedy(model, hidden, max_tokens=20).tokens == expected
            assert decode_beam(model, hidden, 3, max_tokens=20)[0].tokens == expected


# -- decoding ----------------------------------------------------------------------------------------------------------


def every_path(log_probs, blank=0):
    """Log-probability of every token sequence, by adding up all paths; and the best path of each."""
    totals, best = {}, {}
    steps, symbols = log_probs.shape
    for path in itertools.product(range(symbols), repeat=steps):
        value = float(sum(log_probs[t, s] for t, s in enumerate(path)))
        text, starts = [], []
        for t, s in enumerate(path):
            if s != blank and (t == 0 or path[t - 1] != s):
                text.append(s)
                starts.append(t)
        key = tuple(text)
        totals[key] = float(torch.logsumexp(torch.tensor([totals.get(key, -math.inf), value]), 0))
        if value > best.get(key, (-math.inf, []))[0]:
            best[key] = (value, starts)
    return totals, best


def test_prefix_beam_search_adds_up_all_alignments():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)) * 2
    totals, best = every_path(logits.double().log_softmax(-1))
    found = ctc_beam(logits, 500)
    assert found[0].tokens == list(max(totals, key=totals.get))
    for hypothesis in found:
        assert math.isclose(hypothesis.score, totals[tuple(hypothesis.tokens)], rel_tol=1e-4, abs_tol=1e-4)
    for text, (_, starts) in best.items():
        assert align(logits.log_softmax(-1), text) == starts
    assert align(logits.log_softmax(-1), [1, 1, 1, 1]) is None  # needs a blank between


def test_ctc_in_pieces_is_ctc():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    whole, pieces = ctc_greedy(logits), CTCGreedy()
    for piece in logits.split(7):
        pieces.push(piece)
    assert (pieces.found.tokens, pieces.found.positions) == (whole.tokens, whole.positions)
    assert math.isclose(pieces.found.score, whole.score, rel_tol=1e-5)


def test_a_wide_beam_finds_the_best_text():
    """Every text of at most two tokens is scored; the beam of all of them must find the best."""
    config = {**OFFLINE, "vocab_size": 6, "n_dec": 1}
    model = made(3, **config)
    with torch.no_grad():
        model.head.weight.mul_(4)
        hidden, _ = model.encode(torch.randn(1, 20, 20))
        scores = {}
        for n in range(3):
            for text in itertools.product([3, 4, 5], repeat=n):
                state, total = heard(model, hidden), 0.0
                for token, following in zip([1, *text], [*text, 2], strict=True):
                    total += float(next_log_probs(model, torch.tensor([token]), state)[0, following])
                scores[text] = total / ((5 + n + 1) / 6) ** 0.6
        found = decode_beam(model, hidden, 50, max_tokens=2)
    best = max(scores, key=scores.get)
    assert tuple(found[0].tokens) == best
    assert math.isclose(found[0].score, scores[best], rel_tol=1e-4)
    with pytest.raises(ValueError, match="beam width"):
        decode_beam(model, hidden, 0)
