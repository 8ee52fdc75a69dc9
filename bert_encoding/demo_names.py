"""The names by which ``--data`` asks for bundled stories; apart from the demo itself, whose import takes seconds."""

DEMO = "demo"
DEMO_NULL = "demo-null"
DEMO_HELPS = "demo-helps"
DEMOS = (DEMO, DEMO_NULL, DEMO_HELPS)
