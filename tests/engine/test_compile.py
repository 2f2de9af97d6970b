"""The compiled step: no host reads, no recompilation, the numbers of the eager one; what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from samdetr.data.device import prefetch
from samdetr.engine.compute.compile import compile_parts, graphs_compiled
from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.precision import Compute, choose_compute
from samdetr.engine.distributed.parallel import wrap
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.optim import GuardedAdamW, build_optimizer, set_learning_rate
from samdetr.engine.start_up import check_step, prepare_step, random_batch
from samdetr.engine.step import forward_backward, train_step, update
from samdetr.errors import SamdetrError
from samdetr.loss import SetCriterion, build_criterion
from samdetr.models import EncoderDecoder, build_model
from samdetr.recipe import ComputeSection, ParallelSection, Recipe
from tests.engine.runs import MakeRecipe

CPU = torch.device("cpu")
SHAPES = [(64, 64), (96, 80)]  # the first one square: equal sizes must not become one symbol
PARTS = 7  # beside the backbones: embed, encoder layer, first and later decoder layer and refine, criterion
PUBLISHED = ('model.padding="published"', 'model.backbone.norm="frozen"')  # the other of each is tiny's
SYSTEMS = [
    ("model.smca=false", 'model.resampling="max"'),
    pytest.param(
        ("model.smca=false", 'model.resampling="point"', 'model.search_range="image"', "model.reweighting=false"),
        marks=pytest.mark.long,
    ),
    ('model.system="detr"', "model.num_classes=9", 'loss.classification="softmax"'),
    ('model.system="conditional_detr"',),
    ('model.system="smca_detr"',),
    ('model.system="sam_detr_ms"', "model.smca=true", "model.feature_levels=2"),
    pytest.param(
        ('model.system="smca_detr_ms"', "model.backbone.stages=3"),
        marks=pytest.mark.long,
    ),
    pytest.param(
        (
            'model.system="smca_detr_ms"',
            'model.scale_encoder="attention"',
            "model.backbone.stages=3",
            "model.encoder_layers=2",
        ),
        marks=pytest.mark.long,
    ),
    pytest.param(('model.system="deformable_detr"', "model.feature_levels=2"), marks=pytest.mark.long),
    (
        'model.system="deformable_detr"',
        "model.feature_levels=4",
        "model.backbone.stages=3",
        "model.box_refine=true",
        "model.two_stage=true",
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what one test compiled or refused. Graphs are captured and differentiated as ever, but code is
    generated of them only where a test asks for it: that takes a second a graph."""
    torch.compiler.reset()
    if request.node.get_closest_marker("inductor") is None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


class Setup:
    """A model ready to train; `prepare` compiles it."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(recipe.run.seed)
        self.recipe, self.dtype = recipe, dtype
        self.model: EncoderDecoder = build_model(recipe.model).train().to(dtype)
        self.criterion: SetCriterion = build_criterion(recipe)
        self.optimizer: GuardedAdamW = build_optimizer(self.model, recipe.optim)
        self.notes: list[str] = []
        self.started: list[str] = []

    def prepare(
        self,
        *,
        compile: bool = True,
        precision: torch.dtype = torch.float32,
        cuda_graph: bool = False,
        micro_batch: int = 2,
        on_failure: str = "error",
    ) -> StepGraphs | None:
        return prepare_step(
            self.model,
            self.model,
            self.criterion,
            self.optimizer,
            compute=Compute(precision, compile, cuda_graph),
            on_failure=on_failure,
            clip_norm=1.0,
            bucket_shapes=SHAPES,
            micro_batch=micro_batch,
            max_objects=5,
            device=CPU,
            started=self.started.append,
            note=self.notes.append,
        )

    def steps(
        self,
        count: int,
        *,
        precision: torch.dtype = torch.float32,
        shapes: int = len(SHAPES),
        lr: float | None = None,
        images: int = 2,
    ) -> list[float]:
        """The losses of steps that go through the first shapes in turn. lr: None is the recipe's."""
        set_learning_rate(self.optimizer, 1.0 if lr is None else lr)
        losses = []
        for step in range(count):
            torch.manual_seed(step)
            batch = random_batch(SHAPES[step % shapes], images, 5)
            batch = batch._replace(images=batch.images.to(self.dtype))
            values = train_step(
                self.model, self.criterion, self.optimizer, [batch], device=CPU, clip_norm=1.0, precision=precision
            )
            losses.append(values[0].item())
        return losses


@pytest.mark.slow
def test_the_start_up_leaves_no_trace(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    compiled, eager = Setup(recipe), Setup(recipe)
    before = torch.get_rng_state()
    compiled.prepare()
    assert torch.equal(torch.get_rng_state(), before)
    for (name, value), other in zip(
        compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert not compiled.optimizer.state
    assert all(parameter.grad is None for parameter in compiled.model.parameters())
    assert [sentence[:13] for sentence in compiled.started] == [*("compiling 1/2", "compiling 2/2", "checking a st")]


@pytest.mark.slow
@pytest.mark.parametrize(  # rates at which differences of rounding do not grow
    ("options", "dtype", "lr", "difference", "decrease"),
    [
        ((), torch.float32, 1e-5, 5e-5, 0.95),
        pytest.param(PUBLISHED, torch.float64, 1e-4, 1e-8, 0.7, marks=pytest.mark.long),
    ],
)
def test_a_hundred_compiled_steps_are_the_eager_ones(
    make_recipe: MakeRecipe,
    options: tuple[str, ...],
    dtype: torch.dtype,
    lr: float,
    difference: float,
    decrease: float,
) -> None:
    recipe = make_recipe("model.dropout=0.0", f"optim.lr={lr}", f"optim.backbone_lr={lr}", *options)
    compiled, eager = Setup(recipe, dtype), Setup(recipe, dtype)
    before = graphs_compiled()
    compile_parts(compiled.model, compiled.criterion, shapes=len(SHAPES))
    compiled.steps(2 * len(SHAPES), lr=0.0)
    graphs = graphs_compiled()
    assert graphs - before == len(SHAPES) + PARTS
    torch.compiler.set_stance("fail_on_recompile")
    losses = compiled.steps(100)
    assert graphs_compiled() == graphs
    torch.compiler.set_stance("force_eager")
    eager.steps(2 * len(SHAPES), lr=0.0)
    expected = eager.steps(100)
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < difference
    assert expected[99] < decrease * expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", SYSTEMS)
def test_compiled_steps_of_other_systems_are_the_eager_ones(make_recipe: MakeRecipe, options: tuple[str, ...]) -> None:
    recipe = make_recipe("model.dropout=0.0", "optim.lr=1e-5", "optim.backbone_lr=1e-5", *options)
    compiled, eager = Setup(recipe), Setup(recipe)
    compile_parts(compiled.model, compiled.criterion, shapes=len(SHAPES))
    losses = compiled.steps(4)
    graphs = graphs_compiled()
    torch.compiler.set_stance("fail_on_recompile")
    losses += compiled.steps(4)
    assert graphs_compiled() == graphs
    torch.compiler.set_stance("force_eager")
    assert losses == pytest.approx(eager.steps(4) + eager.steps(4), rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "micro_batch"), [pytest.param(torch.float32, 1, marks=pytest.mark.long), (torch.bfloat16, 2)]
)
def test_nothing_is_compiled_after_the_start_up(
    make_recipe: MakeRecipe, precision: torch.dtype, micro_batch: int
) -> None:
    setup = Setup(make_recipe())
    begun = graphs_compiled()
    setup.prepare(precision=precision, micro_batch=micro_batch)
    graphs = graphs_compiled()
    assert graphs - begun == len(SHAPES) + PARTS
    torch.compiler.set_stance("fail_on_recompile")
    setup.steps(4, precision=precision, images=micro_batch)
    assert graphs_compiled() == graphs


@pytest.mark.slow
def test_ddp_splits_no_part(make_recipe: MakeRecipe, one_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would cut graphs at DDP's buckets, of which the first ends after 1 MB."""
    recipe, graphs = make_recipe("model.backbone.stages=4"), []
    for strategy in ("none", "ddp"):
        torch.compiler.reset()
        backend = CompileCounterWithBackend("eager")
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        setup = Setup(recipe)
        compile_parts(setup.model, setup.criterion, shapes=1)
        parallel_model: torch.nn.Module = setup.model
        if strategy == "ddp":
            parallel_model = wrap(setup.model, ParallelSection(strategy="ddp"), ALONE, CPU)
        batch = random_batch(SHAPES[0], 2, 5)
        forward_backward(parallel_model, setup.criterion, batch, batch.targets.counts.sum(), precision=torch.float32)
        graphs.append(backend.frame_count)
    assert graphs == [1 + PARTS] * 2


@pytest.mark.inductor
def test_generated_code_gives_the_eager_losses(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0", "optim.lr=1e-5", "optim.backbone_lr=1e-5", *PUBLISHED)
    compiled, eager = Setup(recipe), Setup(recipe)
    compile_parts(compiled.model, compiled.criterion, shapes=1)
    losses = compiled.steps(20, shapes=1)
    torch.compiler.set_stance("force_eager")
    assert losses == pytest.approx(eager.steps(20, shapes=1), rel=2e-6)


@pytest.mark.inductor
@pytest.mark.long
def test_generated_code_for_all_shapes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0", "optim.lr=1e-5", "optim.backbone_lr=1e-5")
    compiled, eager = Setup(recipe), Setup(recipe)
    compiled.prepare()
    torch.compiler.set_stance("fail_on_recompile")
    losses = compiled.steps(100)
    torch.compiler.set_stance("force_eager")
    assert losses == pytest.approx(eager.steps(100), rel=2e-6)


def test_bf16_follows_fp32(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0")
    losses, expected = Setup(recipe).steps(100, precision=torch.bfloat16), Setup(recipe).steps(100)
    assert losses[0] == pytest.approx(expected[0], rel=3e-3)
    last = [sum(values[-10:]) / 10 for values in (losses, expected)]
    assert last[0] == pytest.approx(last[1], rel=0.1)
    model = Setup(recipe).model
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    assert outputs.logits.dtype == outputs.boxes.dtype == torch.float32


@pytest.mark.slow
def test_compiled_bf16_is_checked_against_eager_fp32(make_recipe: MakeRecipe) -> None:
    setup = Setup(make_recipe())
    setup.prepare(precision=torch.bfloat16)
    assert "start-up check: loss " in setup.notes[-1]
    assert all(parameter.grad is None for parameter in setup.model.parameters())


def test_a_wrong_loss_or_gradient_is_refused() -> None:
    model, batch = torch.nn.Linear(1, 1), random_batch((64, 64), 1, 3)

    def giving(loss: float, slope: float) -> Callable[[object, Tensor], Tensor]:
        def run(batch: object, num_boxes: Tensor) -> Tensor:
            (slope * model.weight).sum().backward()
            return torch.full((5,), loss)

        return run

    sentence = check_step(model, giving(1.05, 3.0), giving(1.0, 2.0), batch)
    assert sentence.startswith("start-up check: loss 1.0500, gradient norm 3 as configured; loss 1.0000, ")
    with pytest.raises(SamdetrError, match=r"the loss of the start-up .* is 1.2 .* but 1 .*more than 10%.*precision"):
        check_step(model, giving(1.2, 2.0), giving(1.0, 2.0), batch)
    with pytest.raises(SamdetrError, match=r"the gradient norm of .* is 5 .* but 2 .*more than 50%.*cuda_graph"):
        check_step(model, giving(1.0, 5.0), giving(1.0, 2.0), batch)


def _breaks(model: EncoderDecoder) -> None:
    forward: Callable[..., Tensor] = model.decoder.layers[0].forward

    def broken(*arguments: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(*arguments)

    model.decoder.layers[0].forward = broken


@pytest.mark.slow
def test_a_failing_compilation_stops_with_the_reason(make_recipe: MakeRecipe) -> None:
    setup = Setup(make_recipe())
    _breaks(setup.model)
    with pytest.raises(SamdetrError, match=r"torch.compile failed at 64 x 64 pixels: .*\n?.*compute.on_failure"):
        setup.prepare()


@pytest.mark.slow
def test_a_failing_compilation_falls_back_aloud(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0")
    setup, eager = Setup(recipe), Setup(recipe)
    _breaks(setup.model)
    setup.prepare(on_failure="eager")
    assert "torch.compile failed" in setup.notes[0]
    assert "Continuing without it" in setup.notes[0]
    assert setup.steps(3) == eager.steps(3)


class _NothingComesFromTheHost(TorchDispatchMode):
    """A number of the host that becomes a tensor is a copy to the device, for which the host waits as for a read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten.lift_fresh.default  # what new_tensor and torch.tensor begin with
        assert not any(isinstance(part, Tensor) and part.device.type == "cpu" for part in args), func
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), PUBLISHED, *SYSTEMS])
def test_nothing_of_the_step_is_read_back(
    make_recipe: MakeRecipe, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device every read of a number raises; the optimizer's own kernel is torch's."""
    meta = torch.device("meta")
    setup = Setup(make_recipe(*options))
    setup.model.to(meta)
    optimizer = build_optimizer(setup.model, setup.recipe.optim)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    batch = [random_batch(shape, 2, 5).to(meta) for shape in SHAPES]
    with _NothingComesFromTheHost():
        values = train_step(setup.model, setup.criterion, optimizer, batch, device=meta, clip_norm=1.0)
    assert values.device == meta
    assert all(parameter.grad is not None for parameter in setup.model.parameters() if parameter.requires_grad)
    with pytest.raises(RuntimeError, match="meta"):
        values[0].item()


def test_choices() -> None:
    gpu = torch.device("cuda")

    def choose(device: torch.device, *, buckets: bool = True, **keys: str) -> Compute:
        return choose_compute(ComputeSection(**{"precision": "bf16", **keys}), device, buckets=buckets)  # type: ignore[arg-type]

    assert choose(CPU) == Compute(torch.bfloat16, compile=False, cuda_graph=False)
    assert choose(CPU, compile="on", precision="fp32") == Compute(torch.float32, compile=True, cuda_graph=False)
    assert choose(gpu) == Compute(torch.bfloat16, compile=True, cuda_graph=False)
    assert not choose(gpu, compile="off").compile
    assert not choose(gpu, buckets=False).compile
    assert choose(gpu, cuda_graph="on").cuda_graph
    with pytest.raises(SamdetrError, match=r'compute.compile = "on" needs .* data.batching = "buckets"'):
        choose(CPU, compile="on", buckets=False)
    with pytest.raises(SamdetrError, match=r'compute.cuda_graph = "on" needs a GPU'):
        choose(CPU, cuda_graph="on")


@pytest.mark.slow
def test_a_failed_recording_leaves_compilation_and_the_optimizer_alone(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(make_recipe())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    recorded: list[int] = []

    def failing(self: StepGraphs, function: object, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) == 1:
            assert setup.optimizer.consecutive_skips > setup.optimizer.max_skips
            raise SamdetrError("recording a CUDA graph failed: no.")
        recorded.append(inputs[0].shape[2] * inputs[0].shape[3])
        assert inputs[0].untyped_storage().nbytes() == 2 * 3 * 96 * 80 * 4  # all shapes in the memory of the largest

    monkeypatch.setattr(StepGraphs, "_recorded", failing)
    with pytest.raises(SamdetrError, match="recording"):
        setup.prepare(cuda_graph=True)
    assert setup.prepare(cuda_graph=True, on_failure="eager") is None
    assert recorded == [96 * 80, 64 * 64] * 2
    assert setup.optimizer.consecutive_skips == setup.optimizer.found_inf == 0
    assert any("Continuing without it" in sentence for sentence in setup.notes)
    assert all(parameter.grad is None for parameter in setup.model.parameters())
    graphs = graphs_compiled()
    before = setup.model.decoder.reference_boxes.detach().clone()
    torch.compiler.set_stance("fail_on_recompile")
    setup.steps(1)
    assert graphs_compiled() == graphs > 0
    assert not torch.equal(setup.model.decoder.reference_boxes, before)


def test_a_replaced_gradient_is_noticed(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(make_recipe())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    graphs = StepGraphs(setup.model, setup.optimizer, lambda batch, num_boxes: num_boxes, lambda loss: loss)
    assert graphs.update(torch.ones(())) == 1
    setup.optimizer.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="replaced"):
        graphs.update(torch.ones(()))


@pytest.mark.gpu
def test_graphs_give_the_eager_losses(make_recipe: MakeRecipe) -> None:
    recipe, gpu = make_recipe("model.dropout=0.0", *PUBLISHED), torch.device("cuda")
    losses = []
    for recorded in (True, False):
        setup = Setup(recipe)
        setup.model.to(gpu)
        optimizer = build_optimizer(setup.model, recipe.optim)
        graphs = None
        if recorded:
            graphs = StepGraphs(
                setup.model,
                optimizer,
                partial(forward_backward, setup.model, setup.criterion, precision=torch.float32),
                partial(update, optimizer, 1.0),
            )
            for shape in SHAPES:
                graphs.record(random_batch(shape, 2, 5).to(gpu))
            graphs.record_update()
        batch = [random_batch(shape, 2, 5) for shape in SHAPES]
        run = partial(train_step, setup.model, setup.criterion, optimizer, device=gpu, clip_norm=1.0, graphs=graphs)
        losses.append([run([batch[step % len(SHAPES)]]).tolist() for step in range(9)])
    assert losses[0] == [pytest.approx(values, rel=1e-4) for values in losses[1]]


@pytest.mark.gpu
@pytest.mark.inductor
@pytest.mark.parametrize("compile", [False, True])
def test_nothing_of_the_step_waits_for_the_gpu(make_recipe: MakeRecipe, compile: bool) -> None:
    gpu = torch.device("cuda")
    setup = Setup(make_recipe(*PUBLISHED))
    setup.model.to(gpu)
    optimizer = build_optimizer(setup.model, setup.recipe.optim)
    if compile:
        compile_parts(setup.model, setup.criterion, shapes=len(SHAPES))
    pinned = [[random_batch(shape, 2, 5).pin_memory() for shape in SHAPES] for _ in range(3)]
    run = partial(train_step, setup.model, setup.criterion, optimizer, device=gpu, clip_norm=1.0, seeds=[1, 2])
    run(next(prefetch(pinned[:1], gpu)), precision=torch.bfloat16)
    torch.compiler.set_stance("fail_on_recompile")
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [run(batch, precision=torch.bfloat16) for batch in prefetch(pinned, gpu)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({value[0].item() for value in values}) == 3


@pytest.mark.gpu
def test_dropout_of_a_replay_is_that_of_its_seed(make_recipe: MakeRecipe) -> None:
    gpu = torch.device("cuda")
    setup = Setup(make_recipe(*PUBLISHED))
    setup.model.to(gpu)
    optimizer = build_optimizer(setup.model, setup.recipe.optim)
    graphs = StepGraphs(
        setup.model,
        optimizer,
        partial(forward_backward, setup.model, setup.criterion, precision=torch.float32),
        partial(update, optimizer, 1.0),
    )
    batch = random_batch(SHAPES[0], 2, 5).to(gpu)
    graphs.record(batch)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(graphs.forward_backward(batch, batch.targets.counts.sum())[0].item())
    assert losses[0] == losses[2] != losses[1]
