"""A step's report travels with the output of vLLM's runner, also with one that is still being copied."""

from types import SimpleNamespace

from vllm_osdt.messages import STEP_REPORT, StepReport
from vllm_osdt.worker.recorder import ReportedOutput


def test_an_output_that_is_still_being_copied_answers_all_that_vllm_asks():
    stock, report = SimpleNamespace(), StepReport()
    copied = SimpleNamespace(get_output=lambda: stock, get_kv_connector_output=lambda: None)
    output = ReportedOutput(copied, lambda: report)
    assert output.get_output() is stock and getattr(stock, STEP_REPORT) is report
    assert output.get_kv_connector_output() is None
