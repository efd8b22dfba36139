"""What a checkpoint, a program or an engine is: sizes, operators, inputs, versions, and a graph to look at."""
