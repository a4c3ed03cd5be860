"""What surrounds the compiled rules on the CPU, in the language of `_words.py`."""

STEPS = """
def follows(joins, a, b, g, h, c, d, width, count):
    if joins[0] < 0 or h != g + count * joins[1]:
        return 0
    for i in range(joins[0]):
        column = joins[2 * i + 2]
        if b[column] != a[column] + count * joins[2 * i + 3]:
            return 0
    for i in range(width):
        if c[i] != d[i]:
            return 0
    return 1
def touch(block):
    n, objects, place, within = block[0], block[1][3], block[2], block[3]
    for k in range(n):
        claim((objects[k][2] + place)[0] + within)
def run(block):
    work, n, table, gradients, numbers, room = block[3], block[4], block[5], block[6], block[7], block[8]
    step, row, width, joins = block[9], 8 * block[10], block[11], block[12]
    if work != 2:
        for t in range(n):
            call(step, table + row * t, 0, 0, -1, numbers, room + 8 * width * t)
    if work == 0:
        if block[13] != 0:
            touch(block[13])
        t = 0
        while t < n:
            first, gradient, out = table + row * t, gradients[t], room + 8 * width * t
            count, last = first[0], t + 1
            while last < n and follows(
                joins, first, table + row * last, gradient, gradients[last], out, room + 8 * width * last, width, count
            ):
                count += table[block[10] * last]
                last += 1
            call(step, first, gradient, 0, count, numbers, out)
            t = last
    if work == 2:
        k = claim(block)
        while k < block[1]:
            piece = block[2] + 24 * k
            t = piece[0]
            call(step, table + row * t, gradients[t], piece[1], piece[2], numbers, room + 8 * width * t)
            k = claim(block)
def place(block, i):
    start = 0
    for d in range(block[13]):
        start += block[10][d * block[11] + i * block[12]] * block[14 + d]
    return start
def enter(block):
    for d in range(block[13]):
        for i in range(block[1]):
            index = block[10][d * block[11] + i * block[12]]
            if index < 0 or index >= block[14 + block[13] + d]:
                return 0
    call(block[9], block[6], 0, 0, -1, block[7], block[8])
    return 1
def rows(block):
    i = claim(block) * block[2]
    while i < block[1]:
        end = i + block[2]
        while i < end and i < block[1]:
            start = place(block, i)
            gradient = block[3] + (i * block[4] - start) * block[5]
            call(block[9], block[6], gradient, start, block[4], block[7], block[8])
            i += 1
        i = claim(block) * block[2]
def squares(block):
    k = claim(block)
    while k < block[1]:
        piece = block[2] + 24 * k
        call(block[5], block[3][piece[0]] + piece[1] * block[6], piece[2], block[4] + 8 * k)
        k = claim(block)
"""
"""`run(block)` makes a step, `squares(block)` sums squares, and `rows(block)`, after `enter(block)` has found all in
their places (it answers 0 if not), steps some rows of one tensor; any number of threads may do so with the same block.

Its words for `run`: the next piece; how many pieces; the address of the pieces (tensor, start, count); what to do
(0 all, 1 only the coefficients, 2 only pieces, until none is left); how many tensors; the addresses of the table, of
the gradients' addresses, of the numbers and of room for the coefficients; the compiled rule (`RuleCode` says
what the last five are made of); words in a row of the table; coefficients of a tensor; the address of what tells
whether a tensor begins where another ends, and is then stepped together with it: how many columns of addresses (-1:
never), the size of the gradient's elements, of each column its place and its elements' size; the address of a block
for `touch`, which says that tensors have changed, or 0.

For `touch`: how many tensors; the address of a Python list of them; where in a `c10::TensorImpl` the address of its
version's counter stands, and where in that the number.

For `rows`: the next batch; how many rows; rows of a batch; the address of the gradients, one row behind the other;
elements of a row; the size of a gradient's element; the tensor's row of the table; the addresses of the numbers and of
room for the coefficients; the compiled rule; the address of indices and their strides, from one dimension and from one
row to the next; how many dimensions, their strides in the tensor, and their sizes. The gradient that the rule is told
begins where it would if there were one for the whole tensor.

For `squares`: the next piece; how many; their address; the gradients' addresses; room for as many float64; the
compiled sum; the size of an element.
"""

WATCH = """
def differ(there, known, count):
    for i in range(count):
        if there[i] != known[i]:
            return 1
    return 0
def unlike(there, known, count):
    told = 0
    for i in range(count):
        told |= there[i] ^ known[i]
    return told
def remembered(block, row, impl):
    if unlike(impl + 16, row + 32, block[23]) != 0:
        return 0
    return unlike((impl + block[24])[0] + block[25], row + 8, 3) == 0
def remember(block, row, impl):
    row[0], storage = impl, (impl + block[24])[0] + block[25]
    for i in range(3):
        row[1 + i] = storage[i]
    for i in range(block[23]):
        row[4 + i] = impl[2 + i]
def expect(row, width):
    row += 48 * width
    for i in range(3):
        prefetch(row[0] + 64 * i)
    for i in range(6):
        prefetch(row[4 + i])
def otherwise(block, tensor, layout):
    answer, dims, layout = block + 32, layout[0], layout + 8
    if block[19] != 0 and (tensor[0] + block[20])[0] != block[21]:
        return 1
    if dims >= 0:
        for i in range(4):
            if call(block[9 + i], tensor, answer) & 0xFFFFFFFF != 0 or block[4] & 0xFFFFFFFF != block[13 + i]:
                return 1
        if call(block[6], tensor, answer) & 0xFFFFFFFF != 0 or block[4] != dims:
            return 1
        for i in range(2):
            if call(block[7 + i], tensor, answer) & 0xFFFFFFFF != 0 or differ(block[4], layout, dims):
                return 1
            layout += 8 * dims
    return call(block[5], tensor, answer) & 0xFFFFFFFF
def seen(block):
    n, objects, data, layout, row = block[0], block[1][3], block[2], block[3], block[22]
    width, moved = block[23] + 4, 0
    for k in range(n):
        if row != 0:
            expect(row, width)
        kind = objects[k][1]
        if kind != block[17] and kind != block[18]:
            return -1
        tensor, dims = objects[k] + 16, layout[0]
        if block[19] != 0:
            tensor = call(block[19], tensor[0])
        if row == 0 or remembered(block, row, tensor[0]) == 0:
            if otherwise(block, tensor, layout):
                return -1
            moved += block[4] != data[k]
            if block[19] != 0:
                data[k] = block[4]
            if row != 0 and dims <= 5 and block[4] == data[k]:
                remember(block, row, tensor[0])
        layout += 8
        if dims > 0:
            layout += 16 * dims
        if row != 0:
            row += 8 * width
    return moved
def look(block):
    if seen(block) != 0:
        return -1
    if block[26] == 0:
        return 0
    return seen(block[26])
def same(block):
    lists = block[0]
    at = block + 8
    for k in range(lists):
        count = at[1]
        if at[0][2] != count or differ(at[0][3], at + 16, count):
            return 0
        at += 16 + 8 * count
    dicts = at[0]
    for k in range(dicts):
        if at[2 * k + 1][3] != at[2 * k + 2]:
            return 0
    return 1
"""
"""`look(block)` compares what is there with what is known of it, `same(block)` lists and dicts.

`look`: how many tensors; the addresses of a Python list of them, of their data's addresses, and of their layouts (how
many dimensions, sizes, strides; -1 = any will do); room for an answer; torch's functions that tell a tensor's data,
dimensions, sizes, strides, and dtype, layout, kind and number of the device; what the last four should say; the two
types that an object may have; and of gradients the address of torch's function that finds one (0: the tensors
themselves are meant), the place and the value of its dispatch keys; the address of rows, each with room for what
`remember` puts down of a tensor (0: there are none), how many words of a `c10::TensorImpl` that is, where the address
of its storage stands, and where in that its data; the address of such a block for the gradients, or 0. Answers -1 if
anything differs, but for gradients with other data, which are put down and counted.

A tensor of which all remembered words are as they were is as it was, and torch's functions are not asked. Sizes and
strides of more than five dimensions stand elsewhere, so those tensors are not remembered. Six rows ahead, `expect`
sends for what will be looked at: a step of many weights has driven it out of the cache.

`same`: how many lists; of each its address, its length and its items; how many dicts; of each its address and its
version. Answers 1 if all are so.

A list's items stand 24 bytes behind its address, an object's type 8, the size of a list 16, its `at::Tensor` 16, a
dict's version 24 (CPython; the caller makes sure).
"""
