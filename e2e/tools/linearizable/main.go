// Linearizable judges histories of a volume's blocks by Porcupine: whether there is an order of all
// operations, each within the time between its call and its answer, in which every read sees what
// the last write before it has left.
//
//	linearizable [-limit 120s] [-picture FILE] HOST=FILE...
//
// The files are what `tercet-attach record` writes; several of one HOST are its lives, in order. It
// prints counts and a verdict as one JSON object. Exit code: 0 linearizable, 1 not, 2 not decided
// (not within the limit for a block, or unreadable).
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

const (
	workers    = 2
	contextOps = 12
)

var exitCodes = map[string]int{"linearizable": 0, "not linearizable": 1, "not decided": 2}

type report struct {
	counts
	Blocks   int      `json:"blocks"`
	Verdict  string   `json:"verdict"`
	Bad      []uint64 `json:"bad"`
	Story    []string `json:"story"`
	SecondsS float64  `json:"seconds"`
}

func main() {
	limit := flag.Duration("limit", 2*time.Minute, "longest time for one block")
	picture := flag.String("picture", "", "where to draw the first block that is bad (HTML)")
	version := flag.Bool("version", false, "print the version of the module that judges")
	flag.Parse()
	if *version {
		fmt.Println("v1.3.1")
		return
	}
	found, err := judge(flag.Args(), *limit, *picture)
	if err != nil {
		fmt.Fprintln(os.Stderr, "linearizable:", err)
		os.Exit(2)
	}
	text, err := json.Marshal(found)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(text))
	os.Exit(exitCodes[found.Verdict])
}

func judge(arguments []string, limit time.Duration, picture string) (*report, error) {
	began := time.Now()
	grouped, err := hosts(arguments)
	if err != nil {
		return nil, err
	}
	found := &report{Verdict: "linearizable", Bad: []uint64{}, Story: []string{}}
	var all []*asked
	for host, paths := range grouped {
		lives, err := load(host, paths, &found.counts)
		if err != nil {
			return nil, err
		}
		all = append(all, lives...)
	}
	blocks := registers(all)
	found.Blocks = len(blocks)
	results := check(blocks, limit)
	for _, block := range slices.Sorted(maps.Keys(results)) {
		switch results[block] {
		case porcupine.Illegal:
			found.Verdict = "not linearizable"
			found.Bad = append(found.Bad, block)
		case porcupine.Unknown:
			if found.Verdict == "linearizable" {
				found.Verdict = "not decided"
			}
			found.Story = append(found.Story, fmt.Sprintf("block %d: no verdict in time", block))
		}
	}
	if len(found.Bad) > 0 {
		found.Story = append(found.Story, tell(blocks[found.Bad[0]], limit, picture)...)
	}
	found.SecondsS = time.Since(began).Seconds()
	return found, nil
}

func check(blocks map[uint64][]porcupine.Operation, limit time.Duration) map[uint64]porcupine.CheckResult {
	results := map[uint64]porcupine.CheckResult{}
	var lock sync.Mutex
	var group sync.WaitGroup
	work := make(chan uint64)
	for range workers {
		group.Go(func() {
			for block := range work {
				result := porcupine.CheckOperationsTimeout(register(), blocks[block], limit)
				lock.Lock()
				results[block] = result
				lock.Unlock()
			}
		})
	}
	for block := range blocks {
		work <- block
	}
	close(work)
	group.Wait()
	return results
}

// tell says around which operation no order can be found: the first to end of those that are not in
// the longest order.
func tell(history []porcupine.Operation, limit time.Duration, picture string) []string {
	result, info := porcupine.CheckOperationsVerbose(register(), history, limit)
	if result != porcupine.Illegal {
		return []string{"the second look did not come to the same end"}
	}
	if picture != "" {
		if err := porcupine.VisualizePath(register(), info, picture); err != nil {
			return []string{err.Error()}
		}
	}
	reached := map[uint64]bool{}
	var longest []porcupine.Operation
	for _, order := range info.PartialLinearizationsOperations()[0] {
		if len(order) > len(longest) {
			longest = order
		}
	}
	for _, each := range longest {
		reached[each.Input.(access).op] = true
	}
	sorted := slices.SortedFunc(slices.Values(history), func(a, b porcupine.Operation) int {
		return int(min(max(a.Return-b.Return, -1), 1))
	})
	at := slices.IndexFunc(sorted, func(each porcupine.Operation) bool {
		return !reached[each.Input.(access).op]
	})
	at = max(at, 0)
	origin := sorted[at].Call
	story := []string{fmt.Sprintf("no order with the operation at 0 ms (of %d)", len(history))}
	for _, each := range sorted[max(0, at-contextOps):min(len(sorted), at+contextOps)] {
		what := each.Input.(access)
		until := "..."
		if each.Return != forever {
			until = fmt.Sprintf("%.3f", float64(each.Return-origin)/1e6)
		}
		story = append(story, fmt.Sprintf("host %d, %.3f to %s ms: %s %v",
			each.ClientId, float64(each.Call-origin)/1e6, until, word(what.op), what))
	}
	return story
}
