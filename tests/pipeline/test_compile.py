"""torch.compile of a pipeline's U-Net: one graph, compiled once for all steps and view counts."""

import torch
from helpers import max_abs_diff

import gafext


def test_the_unet_compiles_once_for_all_steps_and_view_counts(pipe):
    def run(views):
        result = pipe(gafext.PORTRAIT, num_views=views, num_inference_steps=3, generator=0, output_type="latent")
        return result.images

    counts, compiled = (3, 4, 6), []
    expected = {views: run(views) for views in counts}

    def count_and_run(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    pipe.unet.compile(backend=count_and_run, fullgraph=True, dynamic=True)
    for views in counts:
        assert max_abs_diff(run(views), expected[views]) < 1e-4
    assert len(compiled) == 1
