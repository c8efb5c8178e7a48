"""acme_ft's own tests run where acme_ft is installed: in the environment that test_acme.py makes."""

collect_ignore = ["acme_ft"]
