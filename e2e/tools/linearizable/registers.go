package main

import (
	"fmt"
	"math"

	"github.com/anishathalye/porcupine"
)

// access is what an operation does to one block.
type access struct {
	isWrite bool
	// isMaybe: a write that takes effect within its time or never.
	isMaybe bool
	value   uint64
	op      uint64
}

// registers takes operations apart by block: a block is a register of its own, and a history is
// linearizable if that of each register is.
//
// A command that went out more than once is so many writes, of which the last is certain: each may
// have taken effect (the host hears of one end only). A write that may have taken effect, and whose
// value nobody has read, is left out: a history is linearizable with it if and only if it is without it.
func registers(all []*asked) map[uint64][]porcupine.Operation {
	seen := map[uint64]map[uint64]bool{}
	for _, one := range all {
		for offset, value := range one.values {
			block := one.block + uint64(offset)
			if seen[block] == nil {
				seen[block] = map[uint64]bool{}
			}
			seen[block][value] = true
		}
	}
	found := map[uint64][]porcupine.Operation{}
	for _, one := range all {
		for offset := range one.blocks {
			block := one.block + offset
			found[block] = append(found[block], one.at(offset, seen[block])...)
		}
	}
	return found
}

func (a *asked) at(offset uint64, seen map[uint64]bool) []porcupine.Operation {
	operation := func(what access) porcupine.Operation {
		what.op = a.op
		return porcupine.Operation{ClientId: a.host, Input: what, Call: a.call, Return: a.end}
	}
	if a.kind == "read" {
		if !a.isDone {
			return nil
		}
		return []porcupine.Operation{operation(access{value: a.values[offset]})}
	}
	if a.isRefused {
		return nil
	}
	var writes []porcupine.Operation
	for copy := 1; copy <= a.sent; copy++ {
		isCertain := a.isDone && copy == a.sent
		if !isCertain && !seen[a.value()] {
			continue
		}
		// What may come at any later time may as well come after everything.
		isMaybe := !isCertain && a.end != forever
		writes = append(writes, operation(access{true, isMaybe, a.value(), 0}))
	}
	return writes
}

// register is a block: at first zero.
func register() porcupine.Model {
	model := porcupine.NondeterministicModel{
		Init: func() []interface{} { return []interface{}{uint64(0)} },
		Step: func(state, input, _ interface{}) []interface{} {
			what := input.(access)
			switch {
			case what.isMaybe && state != what.value:
				return []interface{}{state, what.value}
			case what.isWrite:
				return []interface{}{what.value}
			case state == what.value:
				return []interface{}{state}
			}
			return nil
		},
		DescribeOperation: func(input, _ interface{}) string { return input.(access).String() },
	}
	return model.ToModel()
}

func (a access) String() string {
	verb := "reads"
	if a.isWrite {
		verb = "writes"
	}
	if a.isMaybe {
		verb = "may have written"
	}
	return verb + " " + word(a.value)
}

// word is a value as a person reads it: which recorder's which operation.
func word(value uint64) string {
	switch value {
	case 0:
		return "zeroes"
	case math.MaxUint64:
		return "a torn block"
	}
	return fmt.Sprintf("%d.%d", value>>32, value&math.MaxUint32)
}
