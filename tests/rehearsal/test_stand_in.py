"""The stand-in for a GPU does what it says: kernels run, and wrong ones are found."""


def test_the_self_check(machine):
    status, said = machine.run("python3 -m prelu_gpu")
    assert status == 0, said
    _, said = said.split("cuda:0: Emulated H100\n")
    assert "runs on     Triton kernels\n" in said
    assert said.count(" ok\n") == 4


def test_wrong_kernels_are_found(broken):
    broken.edit("kernels/formula.py", "tl.where(x > 0, grad_y,", "tl.where(x > 1, grad_y,")
    status, said = broken.run("python3 -m prelu_gpu")
    assert status == 1
    assert "wrong input gradient" in said


def test_a_graph_that_is_not_replayed_is_found(broken):
    broken.edit("tests/rehearsal/stand_in.py", "for step in self._steps:", "for step in ():")
    test = "-k test_a_captured_step_is_that_of_its_inputs_at_each_replay"
    status, said = broken.run("python3 -m pytest tests/torch/test_training_stack.py", test)
    assert status == 1
    assert "1 failed" in said
