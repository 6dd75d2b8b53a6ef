"""Subjects of measurement: the lab's replicates, or the models of the Hub."""

from typing import TYPE_CHECKING

from benchmarks.spec.profile import Profile

if TYPE_CHECKING:
    from benchmarks.subjects.base import Subject


def subject_class(profile: Profile) -> "type[Subject]":
    """Return the class that opens and prepares what a profile measures.

    Imports are here because torch, and `datasets` for the Hub, take seconds.
    """
    if profile.subject == "lab":
        from benchmarks.subjects.lab.replicate import Replicate

        return Replicate
    from benchmarks.subjects.hub.models import HubModels

    return HubModels
