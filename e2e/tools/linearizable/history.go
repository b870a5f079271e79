package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strings"
)

// forever is when an operation ends that may take effect at any later time.
const forever = math.MaxInt64

// noRoom is why a command failed that there was no room for (Capacity Exceeded): it is refused before
// it is ordered, so nobody may ever see it. What was sent before may have been ordered elsewhere.
const noRoom = "NVMe status 0h/81h"

// line is one line of a recorder (node-daemon/crates/engine/src/attach/record.rs).
type line struct {
	At     int64    `json:"at"`
	Op     uint64   `json:"op"`
	Begun  string   `json:"do"`
	Block  uint64   `json:"block"`
	Blocks uint64   `json:"blocks"`
	Told   string   `json:"is"`
	Values []uint64 `json:"values"`
	Why    string   `json:"why"`
}

// asked is an operation of a client, and what became of it.
type asked struct {
	host   int
	op     uint64
	kind   string // read, write, zero
	block  uint64
	blocks uint64
	values []uint64 // of a read
	call   int64
	end    int64 // forever: unknown
	sent   int   // how often its command went out
	isDone bool
	// isRefused: by the only one that it was sent to, before it was ordered. It takes no effect, ever.
	isRefused bool
}

// value is what a write leaves in its blocks.
func (a *asked) value() uint64 {
	if a.kind == "zero" {
		return 0
	}
	return a.op
}

// counts is what a history consists of.
type counts struct {
	Operations    int     `json:"operations"`
	Reads         int     `json:"reads"`
	Writes        int     `json:"writes"`
	Zeroes        int     `json:"zeroes"`
	Unknown       int     `json:"unknown"`
	Failed        int     `json:"failed"`
	SentAgain     int     `json:"sent_again"`
	LongestStallS float64 `json:"longest_stall_s"`
}

// load reads the histories of one host's lives, in order. What is unknown at the end of a life has
// taken effect before the next life's first answer, or never does (rule H3).
func load(host int, paths []string, all *counts) ([]*asked, error) {
	var lives [][]*asked
	for _, path := range paths {
		life, err := loadLife(host, path, all)
		if err != nil {
			return nil, err
		}
		lives = append(lives, life)
	}
	bound := int64(forever)
	for number := len(lives) - 1; number >= 0; number-- {
		first := bound
		for _, each := range lives[number] {
			if each.isDone && each.end < first {
				first = each.end
			}
		}
		for _, each := range lives[number] {
			if !each.isDone {
				each.end = bound
			}
		}
		bound = first
	}
	var whole []*asked
	for _, life := range lives {
		whole = append(whole, life...)
	}
	return whole, nil
}

func loadLife(host int, path string, all *counts) ([]*asked, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	byOp := map[uint64]*asked{}
	var life []*asked
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for number := 1; lines.Scan(); number++ {
		var read line
		if err := json.Unmarshal(lines.Bytes(), &read); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, number, err)
		}
		if read.Begun != "" {
			if byOp[read.Op] != nil {
				return nil, fmt.Errorf("%s:%d: operation %d begins twice", path, number, read.Op)
			}
			one := &asked{
				host: host, op: read.Op, kind: read.Begun, block: read.Block, blocks: read.Blocks,
				call: read.At, end: forever, sent: 1,
			}
			byOp[read.Op] = one
			life = append(life, one)
			continue
		}
		one := byOp[read.Op]
		if one == nil || one.isDone {
			return nil, fmt.Errorf("%s:%d: operation %d is not under way", path, number, read.Op)
		}
		if err := one.take(&read, all); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, number, err)
		}
	}
	for _, one := range life {
		all.add(one)
	}
	return life, lines.Err()
}

func (a *asked) take(read *line, all *counts) error {
	switch read.Told {
	case "again":
		a.sent++
		all.SentAgain++
	case "failed":
		// It may have taken effect all the same, now or later, but for one that there was no room for.
		all.Failed++
		a.isRefused = a.sent == 1 && strings.HasPrefix(read.Why, noRoom)
	case "done":
		if a.kind == "read" && uint64(len(read.Values)) != a.blocks {
			return fmt.Errorf("%d values of %d blocks", len(read.Values), a.blocks)
		}
		a.isDone, a.end, a.values = true, read.At, read.Values
		all.LongestStallS = max(all.LongestStallS, float64(a.end-a.call)/1e9)
	default:
		return fmt.Errorf("nothing is told by %q", read.Told)
	}
	return nil
}

func (all *counts) add(one *asked) {
	all.Operations++
	if !one.isDone && !one.isRefused {
		all.Unknown++
	}
	switch one.kind {
	case "read":
		all.Reads++
	case "write":
		all.Writes++
	default:
		all.Zeroes++
	}
}

// hosts groups arguments HOST=FILE by host, in the order in which they stand.
func hosts(arguments []string) ([][]string, error) {
	var order []string
	files := map[string][]string{}
	for _, argument := range arguments {
		name, file, found := strings.Cut(argument, "=")
		if !found {
			return nil, fmt.Errorf("%q is no HOST=FILE", argument)
		}
		if files[name] == nil {
			order = append(order, name)
		}
		files[name] = append(files[name], file)
	}
	var grouped [][]string
	for _, name := range order {
		grouped = append(grouped, files[name])
	}
	return grouped, nil
}
