"""Wrappers under the profiler and under torch.compile."""

import pytest
import torch
from by_hand import WRAPPERS
from wrapped_networks import assert_same, loss_of, network, train, trained, wrapped

import torchlars

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch's own, in 2.11
def test_the_profiler_records_a_step_once(wrap):
    model, optimizer = trained(wrap)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, range(1))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{wrap.cls.__name__}.step"] == 1
    assert "Optimizer.step#SGD.step" not in counts


# The base is compiled as well. To the bit, but for torch 2.11 and 2.12, whose compiler may round its step otherwise.
COMPILED = 0.0 if [int(number) for number in torch.__version__.split(".")[:2]] >= [2, 13] else 1e-12
OP_OF = {
    "LARS": "torchlars.scale_gradients_",
    "LAMB": "torchlars.scale_updates_",
    "LARS-update": "torchlars.scale_updates_",
}
compiles = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",  # torch's own, while it compiles
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


@pytest.fixture
def graphs():
    """Where a compiler leaves the names of what it compiled."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiler(graphs):
    from torch._dynamo.backends.registry import lookup_backend

    def compile_and_note(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op.startswith("call")])
        return lookup_backend("aot_eager")(module, inputs)

    return compile_and_note


def compiled_for(*pairs):
    """To compile takes seconds: which wrappers on which backends."""
    wraps = {str(wrap): wrap for wrap in WRAPPERS}
    values = [pytest.param(wraps[name], backend, id=f"{name}-{backend}") for name, backend in pairs]
    return pytest.mark.parametrize(("wrap", "backend"), values, indirect=True)


@compiles
@compiled_for(
    ("LARS", "extension"),
    ("LARS", "reference"),
    ("LAMB", "extension"),
    ("LAMB", "reference"),
    ("LARS-update", "extension"),
)
def test_a_compiled_step_equals_an_eager_one_while_lr_and_decay_change(wrap, backend, graphs):
    model, reference = network(), network()
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    optimizer.param_groups[1]["trust_coef"] = expected.param_groups[1]["trust_coef"] = None
    step = torch.compile(optimizer.step, backend=compiler(graphs))
    for number in range(4):
        for one in (model, reference):
            one.zero_grad()
            loss_of(one, number).backward()
        step()
        expected.step()
        assert_same(model, reference, COMPILED)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1 / (1 + number // 2), 0.03]
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=COMPILED, atol=COMPILED)
        assert set(optimizer.trust_ratios()) == set(model[0].parameters())
        ratios = list(zip(optimizer.trust_ratios().values(), expected.trust_ratios().values(), strict=True))
        assert len(ratios) == 2
        assert all(torch.isclose(a, b, rtol=COMPILED, atol=0.0) for a, b in ratios)
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] *= 0.5
            one.param_groups[0]["weight_decay"] = 0.1 / (1 + (number + 1) // 2)
    if backend == "extension":
        assert any(OP_OF[str(wrap)] in graph for graph in graphs)
    assert any("add_" in name for graph in graphs for name in graph)  # the base's step was compiled as well


@compiles
@compiled_for(("LARS", "extension"), ("LARS", "reference"), ("LAMB", "extension"))
def test_a_compiled_step_takes_a_closure_and_a_scheduler(wrap, backend, graphs):
    model, reference = network(), network()
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, expected)]

    def closure(model, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = sum((param**2).sum() for param in model.parameters())
            loss.backward()
            return loss

        return evaluate

    optimizer.step(closure(model, optimizer))  # torch's own SGD cannot begin its momentum in such a step (2.13)
    expected.step(closure(reference, expected))
    step = torch.compile(optimizer.step, backend=compiler(graphs))
    for _ in range(2):
        loss, expected_loss = step(closure(model, optimizer)), expected.step(closure(reference, expected))
        torch.testing.assert_close(loss, expected_loss, rtol=COMPILED, atol=0.0)
        assert_same(model, reference, COMPILED)
        for scheduler in schedulers:
            scheduler.step()


@compiles
@compiled_for(("LARS", "extension"), ("LARS", "reference"))
def test_a_compiled_step_that_raises_gives_hyper_parameters_back(wrap, backend, graphs):
    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError("in the base")

    model = network()
    optimizer = wrap(Raises(model.parameters(), lr=0.1, weight_decay=0.25))
    loss_of(model, 0).backward()
    with pytest.raises(ZeroDivisionError, match="in the base"):
        torch.compile(optimizer.step, backend=compiler(graphs))()
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def breaks_of(optimizer, model, graphs):
    """Return why graphs broke in three compiled steps, and how often."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(optimizer.step, backend=compiler(graphs))
    for number in range(3):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        step()
    return {reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()}


@compiles
@pytest.mark.parametrize(
    "base", [torch.optim.SGD, torchlars.optim.SGD, torchlars.optim.AdamW], ids=["torch", "torchlars", "torchlars-adamw"]
)
@compiled_for(("LARS", "extension"), ("LAMB", "extension"), ("LARS-update", "extension"))
def test_a_graph_breaks_only_where_the_base_breaks_it(wrap, base, backend, graphs):
    def make(model):
        options = {} if base is torchlars.optim.AdamW else {"momentum": 0.9}
        return base(model.parameters(), lr=0.1, weight_decay=0.1, **options)

    of_base, ours = [], []
    model = network()
    reasons = breaks_of(make(model), model, of_base)
    model = network()
    # torch's own step breaks the graph on purpose. Around it that is met twice: in the wrapper's frame, which calls the
    # base's, and then in this.
    assert breaks_of(wrap(make(model)), model, ours) == {reason: 2 * count for reason, count in reasons.items()}
    if base is not torch.optim.SGD:  # nothing breaks: LARS and the base in one graph, of the first step and of others
        assert reasons == {}
        assert len(ours) == len(of_base) == 2


@compiles
@compiled_for(("LARS", "extension"), ("LAMB", "extension"))
def test_inductor_compiles_the_op(wrap, backend, graphs):
    from torch._dynamo.backends.registry import lookup_backend

    def inductor_for_ours(module, inputs):  # the base's graph is torch's own, and takes inductor long
        graphs.append([str(node.target) for node in module.graph.nodes if node.op.startswith("call")])
        is_ours = OP_OF[str(wrap)] in graphs[-1]
        return lookup_backend("inductor" if is_ours else "aot_eager")(module, inputs)

    model, reference = network(), network()
    optimizer, expected = wrapped(wrap, model), wrapped(wrap, reference)
    step = torch.compile(optimizer.step, backend=inductor_for_ours)
    for number in range(2):
        for one in (model, reference):
            one.zero_grad()
            loss_of(one, number).backward()
        step()
        expected.step()
        assert_same(model, reference, COMPILED)
        for one in (optimizer, expected):
            one.param_groups[0]["lr"] *= 0.5
    assert any(OP_OF[str(wrap)] in graph for graph in graphs)


@compiles
@compiled_for(("LARS", "extension"), ("LAMB", "extension"), ("LARS-update", "extension"))
def test_many_layers_do_not_reach_the_limit_of_recompilations(wrap, backend, graphs):
    """The frame of ``step`` was skipped, and functions that it calls for each layer were compiled one by one."""
    torch.manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(3, i + 1)) for i in range(12)]
    optimizer = wrap(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1))
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend=compiler(graphs))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            step()
    assert len(optimizer.trust_ratios()) == 12
