"""One page from runs and evaluations: HTML that needs nothing else, and the same as Markdown.

`content.py` says what a page is made of, `build.py` fills it, `html.py` and `markdown.py` write it down.
"""

from hybridlm.report.build import build
from hybridlm.report.content import Page
from hybridlm.report.evaluations import Evaluation, read_evaluations
from hybridlm.report.write import write

__all__ = ["Evaluation", "Page", "build", "read_evaluations", "write"]
