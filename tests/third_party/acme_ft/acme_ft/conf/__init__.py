"""YAML that ftcore finds through the entry point `acme` in the group `ftcore.conf`."""
