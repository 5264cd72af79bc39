"""What `kvferry bench` measures: the code that the command line and the scripts under benchmarks/ share."""
