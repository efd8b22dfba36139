"""Which options of a check do not go together: what is taken is a promise, so what would do nothing is refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from seekforge.common.errors import OptionError

#: Options that a way of comparing has no use for. The order is that in which they are named.
_ENGINE_ALONE = ("against", "layers", "sensitivity", "max_dump_size", "write_self_check")
_TORCH_ALONE = ("layers", "sensitivity", "numerics", "without", "max_dump_size")
_QUALITY = ("engine", "checkpoint", "quality", "forms", "html", "threads", "as_json", "brief", "quiet", "progress")
_STEPS = ("prompts", "contexts", "modes", "seed")


def refuse_unused(passed: Collection[str], options: Mapping[str, object]) -> None:
    """Refuse options that would be taken and then do nothing.

    Args:
        passed: the names of the options that somebody passed.
        options: the values of all options.

    Raises:
        OptionError: names the first.
    """

    def refuse(names: Iterable[str], why: str) -> None:
        for name in names:
            if name in passed:
                raise OptionError(f"--{name.replace('_', '-')} {why}")

    if options["quality"] is not None:
        unused = [name for name in options if name not in _QUALITY]
        refuse(unused, "is about steps that are compared; --quality runs tasks")
        if options["checkpoint"] is None:
            raise OptionError("--quality needs --checkpoint, the folder with the weights of the exact model")
        return
    if "prompts" in passed:
        refuse(("contexts",), "says how long random prompts are; --prompts has its own lengths, drop --contexts")
    refuse(("forms",), "are beside engines in the table of --quality; give that too")
    if options["from_dump"]:
        if options["engine"] is not None:
            raise OptionError("--from-dump takes one or two dumps and no ENGINE")
        refuse(_ENGINE_ALONE, "needs an ENGINE to run; dumps show what they show")
        refuse(_STEPS, "says what to run; a dump has run its own steps")
        if options["checkpoint"] is None:
            refuse(("numerics", "without"), "says how PyTorch computes, which needs --checkpoint")
    elif options["engine"] is None:
        refuse(_ENGINE_ALONE, "needs an ENGINE")
        refuse(("html", "max_kl"), "is about a comparison; without ENGINE there is none")
    elif options["against"] != "torch":
        refuse(_TORCH_ALONE, "needs --against torch")
        if options["against"] != "transformers":
            refuse(("write_self_check",), "needs --against torch or transformers")
    if options["save"] is None:
        refuse(("force",), "replaces what stands at --save; give that too")
