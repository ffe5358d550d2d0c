"""``bayes-dispatch fit``: a bundle's dispatcher again, fitted to prompts of the user's own, or to evidence of them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bayes_dispatch.app.commands.terminal import (
    UNCALIBRATED,
    BundleOption,
    DeviceOption,
    DtypeOption,
    RayOption,
    SeedOption,
    check_new_output,
    components_of,
    mapped_on_ray,
    open_bundle,
    refuse_unused,
)
from bayes_dispatch.errors import ConfigError, PromptError

__all__ = ["fit"]


def fit(
    out: Annotated[Path, typer.Option(help="Directory of the new bundle; it may be that of the old one.")],
    examples: Annotated[
        Path | None,
        typer.Option(
            help='Lines of {"expert": NAME, "text": …}, each text a prompt, cut to what the model reads, some of '
            'every expert; NAME may be "base", or left out where nobody knows. Mixed prompts are made of these.'
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            help="In place of prompts, what a first pass found of them: an .npz file of hidden, counts, lengths, "
            "labels and mixtures. It should have mixed prompts, too: none are made."
        ),
    ] = None,
    ray: RayOption = False,
    bundle: BundleOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
) -> None:
    """Fit a bundle's dispatcher again, to prompts of your own, and write the bundle with it.

    Afterwards it knows these prompts alone, so give some of every expert. Labels of evidence are the numbers of the
    bundle's experts from 0, and -1 where unknown. The bundle's gate was calibrated for the old dispatcher and is left
    out, as are calibrated intervals: calibrate-gate makes others.
    """
    if (examples is None) == (evidence is None):
        raise ConfigError(f"expected either --examples or --evidence, got {'none' if examples is None else 'both'}")
    refuse_unused("--ray", ray, examples is not None, "with --examples")
    check_new_output(out, "bundle.json", bundle)
    cluster = mapped_on_ray(device) if ray else None
    import numpy as np

    from bayes_dispatch.app.training.own_expert import check_every_expert, with_dispatcher
    from bayes_dispatch.dispatcher.evidence.files import EvidenceFile, read_evidence
    from bayes_dispatch.experts.domains.own_files import check_examples, read_examples
    from bayes_dispatch.inference.scoring.evidence_sets import known_weights, prompts_of_several
    from bayes_dispatch.inference.two_pass.first_pass import first_pass
    from bayes_dispatch.inference.two_pass.prompts import clipped

    given = [] if examples is None else read_examples(examples)
    if examples is not None:
        check_examples(given, components_of(bundle), examples)
    if evidence is not None:
        known = read_evidence(evidence)
    system, made = open_bundle(bundle, device, dtype), 0
    if examples is not None:
        for each in given:
            if not system.tokenizer.tokenize(each.text).ids:
                raise PromptError(f"expected a prompt of at least 1 token in line {each.line} of {examples}, got none")
        labels, known_mixtures = known_weights([each.expert for each in given], system.experts.components)
        texts = {name: [each.text for each in given if each.expert == name] for name in system.experts.names}
        check_every_expert({name: len(own) for name, own in texts.items()})  # before they are read
        mixed, shares = prompts_of_several(system.model, list(texts.values()), len(given), seed)
        begun = [clipped(system.tokenizer, each.text, system.model.longest) for each in given]
        prompts, made, progress = begun + mixed, len(mixed), sys.stderr.isatty()
        if cluster is None:
            seen = first_pass(system.model, system.tokenizer, prompts, progress=progress, cut=system.cut).evidence
        else:
            from bayes_dispatch.app.bulk import evidence_in_blocks
            from bayes_dispatch.app.bundle_at import BundleAt

            with cluster as mapped:
                place = BundleAt.here(bundle, device, dtype)
                seen = evidence_in_blocks(mapped, place, system.tokenizer, prompts, progress)
        mixtures = np.concatenate([known_mixtures, shares])
        known = EvidenceFile(seen, np.append(labels, np.full(made, -1)), mixtures)
    new = with_dispatcher(system, known.evidence, known.labels, known.mixtures, seed, progress=True)
    new.save(out)
    given_prompts = f"{len(known.evidence) - made} prompts" + (f", and {made} that mix them" if made else "")
    print(f"{out}: a dispatcher over {', '.join(new.experts.names)}, fitted on {given_prompts}")
    print(UNCALIBRATED)
