"""Compares what checkov found with what is expected: policy.py EXPECTED FOUND.json"""

import json
import sys

expected_file, found_file = sys.argv[1:]
expected = {}
with open(expected_file) as lines:
    for line in lines:
        if line.strip() and not line.startswith("#"):
            check, resource, why = line.split(maxsplit=2)
            expected[check, resource] = why

with open(found_file) as file:
    reports = json.load(file)
reports = reports if isinstance(reports, list) else [reports]
failed = [failure for report in reports for failure in report["results"]["failed_checks"]]
used, wrong = set(), set()
for failure in failed:
    check, resource = failure["check_id"], failure["resource"]
    known = [key for key in ((check, resource), (check, "*")) if key in expected]
    used.update(known)
    if not known:
        wrong.add(f"{check} {resource}: {failure['check_name']}")
wrong |= {f"{check} {resource}: expected in {expected_file}, not found" for check, resource in set(expected) - used}
passed = sum(report["summary"]["passed"] for report in reports)
if wrong or not passed:
    sys.exit("\n".join(sorted(wrong)) or "checkov checked nothing")
