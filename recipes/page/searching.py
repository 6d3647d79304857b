"""What the page shows of a deliberate search: the steps of its samples as they happen, and what they conclude."""

from urllib.parse import quote

from nicegui import ui

from recipes.page.elements import plain
from rollout.deliberation.deliberating import Conclusion, Deliberation, link
from rollout.deliberation.episodes import ShownStep

SOURCE = "/source"  # of a document's text, by its id


class SearchArea:
    """The steps of the samples, which grow; and the conclusion of the vote, once there is one."""

    def __init__(self, deliberation: Deliberation) -> None:
        self.deliberation = deliberation
        self.samples: list[ui.element] = []
        self.shown = [0] * len(deliberation.episodes)
        with ui.element("div").classes("samples"):
            for episode in deliberation.episodes:
                with ui.element("section").classes("sample"):
                    plain(f"Sample {episode.sample + 1}", "h4")
                    self.samples.append(ui.element("ol"))
        self.fill()

    def fill(self) -> None:
        """Show the steps that are new."""
        for place, episode in enumerate(self.deliberation.episodes):
            with self.samples[place]:
                for step in episode.shown[self.shown[place] :]:
                    step_element(step)
            self.shown[place] = len(episode.shown)

    def conclude(self) -> None:
        """Show why samples failed, and the conclusion, if the search is complete and there is one."""
        for sample, episode in zip(self.samples, self.deliberation.episodes, strict=True):
            if episode.failure:
                with sample:
                    plain(f"no vote: {episode.failure}", "li", "notice")
        found = self.deliberation.chosen if self.deliberation.is_complete else None
        if found is None:
            return
        stated = "no confidence stated" if found.confidence is None else f"confidence {found.confidence:.1f} of 10"
        with ui.element("div").classes("head"):
            plain(f"{stated}: {'certain' if found.is_certain else 'not certain'}", "span", "chip")
            for weighted, how in ((True, "weighted by confidence"), (False, "by majority")):
                of_vote = self.deliberation.conclusion(weighted)
                assert of_vote is not None  # both votes have an answer, or none has
                plain(f"{how}: {of_vote.answer} ({of_vote.share:.0%} of the votes)", "span", "chip")
        sources(found)


def step_element(shown: ShownStep) -> None:
    """A step with what is wrong with it, the environment's reply, and links to what that shows."""
    with ui.element("li").classes("step"):
        plain(shown.step.action, "b")
        plain(shown.step.content, "span", "text-inline")
        fault = shown.step.fault
        plain(fault or "ok", "span", "chip worse" if fault else "chip")
        if shown.reply is not None:
            plain(shown.reply.removeprefix("<result>").removesuffix("</result>"), classes="text reply")
        for document_id in dict.fromkeys(document.id for document in shown.documents):
            source_link(document_id)


def sources(found: Conclusion) -> None:
    """The documents that the samples with the answer were shown."""
    if found.sources:
        plain("Sources", "h4")
    with ui.element("ul").classes("sources"):
        for source in found.sources:
            with ui.element("li"):
                source_link(source.id)
                if source.has_answer:
                    plain("has the answer", "span", "chip")


def source_link(document_id: str) -> None:
    """A link to a document: to its web address if its id is one, else to its text here."""
    element = plain(document_id, "a", "source")
    element.props["href"] = link(document_id) or f"{SOURCE}?id={quote(document_id, safe='')}"
    element.props["target"] = "_blank"
    element.props["rel"] = "noopener noreferrer"
