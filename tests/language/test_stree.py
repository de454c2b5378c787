"""Tree decoding: verification, the pass over a tree, drafts, and that texts are those of plain decoding."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import zoo
from zoo.reference import read_golden
from zoo_language.commands import generate as command
from zoo_language.drafts import STATIC_TREE, ModelDraft, NGramDraft, draft_of
from zoo_language.generation import Sampling, generate
from zoo_language.mamba import MambaLM
from zoo_language.stree import filtered
from zoo_language.tree_pass import TreePass, mamba2_replay, mamba2_tree
from zoo_language.tree_verification import Tree, match_greedy, speculative_sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "stree__tree9_g1.safetensors"
ATTENTION = {"causal": True, "head_dim": 8, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4, "d_conv": 3}
KINDS = {
    "mamba2": {},
    "groups": {"ssm": {"d_state": 8, "headdim": 8, "ngroups": 2, "D_has_hdim": True, "dt_limit": (0.01, 0.2)}},
    "gate": {"ssm": {"d_state": 8, "headdim": 8, "rmsnorm": False, "conv_activation": "hardswish", "d_ssm": 32}},
    "hybrid": {"attention_layers": [1], "attention": ATTENTION, "d_intermediate": 40},
}


def build(kind, seed=0):
    torch.manual_seed(seed)
    arguments = {"layer": "Mamba2", "ssm": {"d_state": 8, "headdim": 8}} | KINDS[kind]
    model = MambaLM(32, 3, 50, **arguments).eval()
    with torch.no_grad():  # far from ties
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def prompt(length, seed=0):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TREE = Tree([7, 3, 9, 1, 1, 30, 12, 3, 8], [-1, 0, 0, 1, 1, 2, 4, 4, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_reads_every_branch_as_if_alone(kind):
    model = build(kind)
    state = model.prefill(torch.tensor([prompt(9)]))
    before = state.fork()
    verify = TreePass(model)
    logits = verify(TREE, state)
    for old, new in zip(before.layers, state.layers, strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)  # the state stays
    for node in range(9):
        path = [j for j, on in enumerate(TREE.mask()[node]) if on]
        alone = before.fork()
        for j in path:
            model.step(torch.tensor([TREE.tokens[j]]), alone)
        torch.testing.assert_close(logits[node], alone.logits[0], rtol=1e-4, atol=1e-5)
        moved = before.fork()
        verify(TREE, moved)
        verify.accept(path, moved)
        assert moved.position.tolist() == alone.position.tolist()
        torch.testing.assert_close(moved.logits, alone.logits, rtol=1e-4, atol=1e-5)
        a, b = (model.step(torch.tensor([5]), s) for s in (moved, alone))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Oracle:
    """Drafts trees in which the right continuation is one branch among wrong ones, up to a wrong turn now and then."""

    def __init__(self, future, every=4):
        self.future, self.every = future, every

    def start(self, tokens):
        self.at = -1

    def extend(self, tokens):
        self.at += len(tokens)

    def propose(self, depth):
        tokens, parents = [self.future[self.at]], [-1]
        good = 0
        for d in range(min(depth, 5)):
            right = self.future[(self.at + d + 1) % len(self.future)]
            wrong = (right + 1) % 50
            pair = [wrong, wrong] if (self.at + d) % self.every == 0 else [wrong, right]
            tokens += pair
            parents += [good, good]
            good = len(tokens) - 1
        return Tree(tokens, parents)


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, seed=5)])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_states_are_those_of_plain_decoding(kind, how):
    model = build(kind)
    plain, end = generate(model, [prompt(9)], max_new_tokens=30, sampling=how)
    tokens = plain[0].tokens
    for draft in (Oracle(tokens), Oracle(tokens, every=3), NGramDraft(order=2).count(tokens), ModelDraft(build(kind))):
        texts, state = generate(model, [prompt(9)], max_new_tokens=30, sampling=how, speculative=draft)
        assert texts[0].tokens == tokens
        assert texts[0].reason == "length"
        assert texts[0].passes + texts[0].accepted == 30
        assert texts[0].accepted > 0
        assert state.position.tolist() == end.position.tolist() == [39]
        torch.testing.assert_close(state.logits, end.logits, rtol=1e-4, atol=1e-5)
        again = [generate(model, [[]], state=s.fork(), max_new_tokens=5)[0][0].tokens for s in (state, end)]
        assert again[0] == again[1]


def test_a_draft_that_is_the_target_saves_passes():
    model = build("mamba2")
    chain = ((1,),) * 4
    for branching in (STATIC_TREE, chain):
        texts, _ = generate(model, [prompt(6)], max_new_tokens=26, speculative=ModelDraft(model, branching))
        assert texts[0].passes == 6  # five tokens a pass, and the last token by itself
        assert texts[0].accepted == 20
    other = ModelDraft(build("mamba2", seed=3), chain)  # an untrained stranger is right now and then at most
    texts, _ = generate(model, [prompt(6)], max_new_tokens=26, speculative=other)
    assert texts[0].passes > 10


def test_ends_are_those_of_plain_decoding():
    model = build("mamba2")
    future = generate(model, [prompt(6)], max_new_tokens=30)[0][0].tokens
    stop = future[11]
    words = {"decode": lambda ids: " ".join(map(str, ids)), "stop_strings": [f"{future[7]} {future[8]}"]}
    for ends in ({"stop_tokens": [stop]}, words, {"max_new_tokens": 13}, {"max_new_tokens": 1}, {"max_new_tokens": 0}):
        ends = {"max_new_tokens": 30} | ends
        plain, a = generate(model, [prompt(6)], **ends)
        found, b = generate(model, [prompt(6)], **ends, speculative=Oracle(future, every=7))
        assert (plain[0].tokens, plain[0].reason, plain[0].text) == (found[0].tokens, found[0].reason, found[0].text)
        assert a.position.tolist() == b.position.tolist()
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)


def test_rows_are_decoded_one_after_another():
    model = build("hybrid")
    prompts = [prompt(9), prompt(2, 1), prompt(5, 2)]
    plain, a = generate(model, prompts, max_new_tokens=12)
    found, b = generate(model, prompts, max_new_tokens=12, speculative=NGramDraft())
    assert [t.tokens for t in plain] == [t.tokens for t in found]
    assert a.position.tolist() == b.position.tolist()


def test_static_tree_is_the_papers():
    draft = ModelDraft(build("mamba2"))
    draft.start(prompt(5))
    tree = draft.propose(4)
    assert tree.parents == [-1, 0, 0, 0, 0, 0, 1, 1, 2, 3, 6, 6, 7, 8, 10, 10, 11, 11]
    assert max(draft.propose(2).depths()) == 2
    best = draft._state.logits[0, :50].topk(5).indices.tolist()
    assert tree.tokens[1:6] == best


def test_ngrams():
    draft = NGramDraft(order=2, nodes=4, depth=3).count([1, 2, 3, 1, 2, 4, 1, 2, 3])
    draft.start([9, 1, 2])
    tree = draft.propose(3)
    assert tree.tokens[0] == 2
    assert tree.tokens[tree.children(0)[0]] == 3  # followed (1, 2) twice, 4 once
    assert len(tree.tokens) == 4
    assert max(tree.depths()) <= 3
    assert draft.propose(1).parents == [-1, 0, 0]
    draft.extend([7, 1, 2, 7, 1, 2])  # the text's own habits count, for this text
    assert draft.propose(1).tokens[1] in (3, 7)
    draft.start([1, 2])
    assert draft.propose(1).tokens == [2, 3, 4]
    draft.start([42])
    assert draft.propose(3).tokens == [42]  # never seen: nothing to say
    sure = NGramDraft(order=2, least=0.6).count([1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 6, 5, 6, 5, 6])
    sure.start([1, 2])
    assert sure.propose(3).tokens == [2]
    sure.start([6, 5])
    assert sure.propose(1).tokens == [5, 6]


def test_verification_by_hand():
    logits = torch.zeros(9, 50)
    for node, token in {0: 3, 1: 1, 3: 9, 4: 12, 6: 8}.items():
        logits[node, token] = 5
    found = match_greedy(TREE, logits)  # both children 3 and 4 of node 1 hold token 1: the lower index counts
    assert (found.path, found.tokens) == ([0, 1, 3], [3, 1, 9])
    assert found.mask(9).long().tolist() == TREE.mask()[3].long().tolist()
    assert TREE.mask()[8].nonzero()[:, 0].tolist() == [0, 1, 4, 6, 8]
    assert Tree.from_mask(TREE.tokens, TREE.mask()).parents == TREE.parents


def test_speculative_sampling_keeps_the_distribution():
    """Exactly: the chance of each first token, over all outcomes of the draws for a root and its two children."""
    torch.manual_seed(0)
    target, draft = torch.randn(3, 4), torch.randn(3, 4)
    p, q = target[0].softmax(0), draft[1].softmax(0)
    total = torch.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        drawn = q[first] * q[second] / (1 - q[first])  # without replacement
        tree = Tree([0, first, second], [-1, 0, 0])
        accept_first = min(1.0, float(p[first] / q[first]))
        rest = (p - q).clamp(min=0)
        rest = rest / rest.sum() if rest.sum() > 0 else p
        q2 = q.clone()
        q2[first] = 0
        q2 = q2 / q2.sum()
        accept_second = min(1.0, float(rest[second] / q2[second]))
        for u, v, chance in (
            (0.0, 0.0, accept_first),
            (2.0, 0.0, (1 - accept_first) * accept_second),
            (2.0, 2.0, (1 - accept_first) * (1 - accept_second)),
        ):
            if chance > 1e-9:
                got, last = speculative_sampling(tree, target, draft, iter([u, v]), lambda x: int(x.argmax()))
                if len(got.path) > 1:
                    total[got.tokens[0]] += drawn * chance
                else:
                    total += drawn * chance * last
    torch.testing.assert_close(total, p, rtol=1e-4, atol=1e-5)


def test_golden_tree_with_other_shapes():
    """Batches, gates and skips a channel, against single steps (the recorded file has none of them)."""
    golden = read_golden(GOLDEN)
    torch.manual_seed(0)
    inputs = {k: v for k, v in golden.inputs.items() if k.startswith("op.")}
    inputs = {k: torch.cat([v, v + 0.1]) if v.dim() > 2 and k != "op.mask" else v for k, v in inputs.items()}
    inputs["op.mask"] = golden.inputs["op.mask"].expand(2, -1, -1)
    inputs |= {"op.D": torch.randn(2, 8), "op.z": torch.randn(2, 9, 2, 8)}
    adapter = zoo.reference("stree")
    found = adapter.run(adapter.build({"op": golden.config["op"]}, {}), inputs)
    torch.testing.assert_close(found["op.y"], found["op.out_before_gate"] * torch.nn.functional.silu(inputs["op.z"]))
    node, states = 8, inputs["op.initial_states"]
    for j in (0, 1, 4, 6, 8):
        d = torch.nn.functional.softplus(inputs["op.dt"][:, j] + inputs["op.dt_bias"])
        fed = torch.einsum("bhp,bn->bhpn", d[..., None] * inputs["op.x"][:, j], inputs["op.B"][:, j, 0])
        states = torch.exp(d * inputs["op.A"])[..., None, None] * states + fed
    y = torch.einsum("bhpn,bn->bhp", states, inputs["op.C"][:, node, 0]) + inputs["op.D"] * inputs["op.x"][:, node]
    torch.testing.assert_close(found["op.out_before_gate"][:, node], y, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="Mamba-2 and attention have a tree form"):
        TreePass(MambaLM(16, 1, 20))
    with pytest.raises(ValueError, match="an earlier node"):
        Tree([1, 2], [-1, 1])
    model = build("mamba2")
    with pytest.raises(ValueError, match="goes with neither"):
        generate(model, [[1]], speculative=NGramDraft(), cuda_graphs=True)
    with pytest.raises(ValueError, match="there is no text"):
        NGramDraft().propose(2)
    with pytest.raises(ValueError, match="no argument wide"):
        zoo.reference("stree").build({"layer": {"wide": 3}}, {})


def test_on_the_command_line():
    arguments = ["mamba2_micro", "And it came to pass", "--max-new-tokens", "40", "--json"]
    plain = CliRunner().invoke(command, arguments, catch_exceptions=False)
    ngram = CliRunner().invoke(command, [*arguments, "--draft", "ngram"], catch_exceptions=False)
    model = CliRunner().invoke(command, [*arguments, "--draft", "mamba2_micro"], catch_exceptions=False)
    texts = {json.loads(result.stdout)["text"] for result in (plain, ngram, model)}
    assert len(texts) == 1
    with pytest.raises(ValueError, match="cannot draft"):
        draft_of("mamba2_micro", build("mamba2"))


def test_rows_of_a_batch_accept_differently():
    torch.manual_seed(0)
    mixer = build("groups").layers[0].mixer
    u, mask = torch.randn(2, 9, 32), TREE.mask()[None].expand(2, -1, -1)
    state = {k: torch.randn_like(v) for k, v in mixer.init_state(2).items()}
    paths = [[0, 1, 4, 6, 8], [0, 2]]
    accepted = torch.zeros(2, 9, dtype=torch.bool)
    for row, path in enumerate(paths):
        accepted[row, path] = True
    moved = {k: v.clone() for k, v in state.items()}
    with torch.no_grad():
        _, kept = mamba2_tree(mixer, u, state, mask)
        mamba2_replay(mixer, kept, moved, accepted)
        for row, path in enumerate(paths):
            alone = {k: v[row : row + 1].clone() for k, v in state.items()}
            for node in path:
                mixer.step(u[row : row + 1, node], alone)
            for name, value in alone.items():
                torch.testing.assert_close(moved[name][row], value[0], rtol=1e-4, atol=1e-5)


# -- the original's switches -------------------------------------------------------------------------------------------


def test_filters_of_the_original():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    inf = torch.inf
    assert torch.equal(filtered(logits, "x(sequence, top_k=0, temperature=1, top_p=0)"), logits)
    assert torch.equal(filtered(logits, "top_k=0, temperature=0.5"), logits * 2)
    assert torch.equal(filtered(logits, "top_k=1"), torch.tensor([[1.0, -inf, -inf, -inf]]))
    assert torch.equal(filtered(logits, "top_k=2"), torch.tensor([[3.0, -inf, 2.0, -inf]]))
    # masses 0.644, 0.237, 0.087, 0.032: the two lowest hold less than 0.2
    assert torch.equal(filtered(logits, "top_k=0, top_p=0.8"), torch.tensor([[3.0, -inf, 2.0, -inf]]))
    for call in ("top_k=3, temperature=0.5", "min_p=0.1"):
        with pytest.raises(ValueError, match="the original cannot filter"):
            filtered(logits, call)


def test_replaying_accepted_nodes_knows_no_limits_of_dt_as_published():
    golden = read_golden(GOLDEN)
    inputs = {k: v for k, v in golden.inputs.items() if k.startswith("layer.")}
    adapter = zoo.reference("stree")

    def run(**more):
        layer = golden.config["layer"] | more | {"A_init_range": [1, 4], "dt_min": 0.01}  # initialisation says nothing
        return adapter.run(adapter.build({"layer": layer}, golden.state), inputs)

    free, limited = run(), run(dt_limit=[0.05, 0.1])
    torch.testing.assert_close(free["layer.y1"], golden.outputs["layer.y1"], rtol=1e-4, atol=1e-5)
    assert (free["layer.y1"] - limited["layer.y1"]).abs().max() > 1e-3
    torch.testing.assert_close(limited["layer.ssm_state_after_verify"], free["layer.ssm_state_after_verify"])
