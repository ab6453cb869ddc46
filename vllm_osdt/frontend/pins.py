"""Profiles that requests pin: one id of a task's profile, which must be there and made for such a request."""

from collections import OrderedDict

from vllm_osdt.calibration.profile import ProfileKey
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.options import AUTO_TASK, DecodingOptions

MAX_PINS = 1024  # pinned profiles whose keys are remembered


class Pins:
    """The pinned profiles that a front end has found.

    Args:
        store: Where profiles are; None where they are kept in memory only.
    """

    def __init__(self, store: ProfileStore | None) -> None:
        self._store = store
        self._keys: OrderedDict[tuple[str, str], ProfileKey] = OrderedDict()

    def check(self, options: DecodingOptions) -> None:
        """Refuse a pin that cannot hold.

        Args:
            options: Of the request; ``profile`` is set.

        Raises:
            InvalidOptionError: Something else in the request stands against it, there is no such profile, or it was
                made with another block length, cache mode or threshold.
        """
        if not options.calibrates:
            raise InvalidOptionError(
                f"profile is {options.profile!r}, but policy {options.policy!r} uses none; leave it out.",
                refusal="pin-policy",
                parameter="profile",
                value=options.profile,
            )
        if options.recalibrate or options.task == AUTO_TASK:
            what = "recalibrate" if options.recalibrate else f"task {AUTO_TASK!r}"
            raise InvalidOptionError(
                f"profile is {options.profile!r}, which {what} contradicts; name the profile's own task and leave "
                "recalibrate out.",
                refusal="pin-contradicted",
                parameter="profile",
                value=options.profile,
            )
        if options.task is None:
            raise InvalidOptionError(
                f"profile is {options.profile!r}, but no task is named; send the profile's own.",
                refusal="pin-task",
                parameter="profile",
                value=options.profile,
            )
        if self._store is None:
            raise InvalidOptionError(
                f"profile is {options.profile!r}, but this server keeps profiles in memory only; start it with a "
                "profile_dir.",
                refusal="pin-memory",
                parameter="profile",
                value=options.profile,
            )
        assert options.profile is not None
        pin = (options.task, options.profile)
        if pin not in self._keys:
            found = self._store.load_id(*pin)
            if found is None:
                raise InvalidOptionError(
                    f"profile is {options.profile!r}, but task {options.task!r} of this model has no such profile; "
                    "send an id that `vllm-osdt profiles list` shows, or bring it back with `profiles import`.",
                    refusal="pin-unknown",
                    parameter="profile",
                    value=options.profile,
                )
            self._keys[pin] = found.key
            if len(self._keys) > MAX_PINS:
                self._keys.popitem(last=False)
        key = self._keys[pin]
        # Of sub-blocks and editing the key's cache mode tells too.
        asked = {"block_length": options.block_length, "cache": options.cache_key, "threshold": options.threshold}
        for name, value in asked.items():
            made_with = getattr(key, name)
            if made_with != value:
                name = "cache_mode" if name == "cache" else name
                remedy = f"send osdt_{name} = {made_with!r}"
                if ":" in f"{made_with}{value}":
                    remedy = (
                        "send the sub_block_length, sub_block_cache, edit_threshold, refresh_interval, "
                        "refresh_confidence, suffix_window, adablock and credit that it was made with"
                    )
                raise InvalidOptionError(
                    f"profile {options.profile!r} was made with {name} {made_with!r}, but the request has {value!r}; "
                    f"{remedy}.",
                    refusal="pin-made-with",
                    parameter="profile",
                    value=options.profile,
                )
