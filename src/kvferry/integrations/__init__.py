"""kvferry inside other frameworks, one folder each. Only these folders import a framework."""
