"""The trainer and what surrounds a run. It knows no method, family or metric by name."""
