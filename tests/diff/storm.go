// The clients of refusals.py: some hide requests in bodies, honest ones ask meanwhile. Reads one job as JSON on standard
// input and writes what came of it as JSON.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

type kind struct {
	Name    string
	Head    string // all lines of the head but those of its framing, {run} in place of the run's number
	Chunked bool
	Bare    bool // no body: what follows are requests without a key
	More    int  // bytes of the body that are claimed and never sent
	Before  int  // bytes of the head as the server gets it
	Hidden  string
}

type job struct {
	To     string
	Key    string
	Runs   int
	AtOnce int
	Honest int
	Status int // what the server answers to honest ones
	Kinds  []kind
}

type result struct {
	Answers  map[string]map[string]int // by kind and status
	Honest   int                       // clients that got the server's own answer to each request
	Troubles []string
	Runs     int
}

const (
	block    = 4096                  // the server reads so many bytes at once, and may lose what is left of them
	unit     = 64                    // bytes of a hidden request; they divide a block
	patience = 20 * time.Second      // for an answer that must come
	early    = 20 * time.Millisecond // for an answer that may come before the body
	asked    = 4                     // requests of an honest client
)

var (
	work   job
	number atomic.Int64
	mutex  sync.Mutex
	got    = result{Answers: map[string]map[string]int{}, Troubles: []string{}}
)

func trouble(format string, values ...any) {
	mutex.Lock()
	defer mutex.Unlock()
	if len(got.Troubles) < 20 {
		got.Troubles = append(got.Troubles, fmt.Sprintf(format, values...))
	}
}

func count(name, status string) {
	mutex.Lock()
	defer mutex.Unlock()
	if got.Answers[name] == nil {
		got.Answers[name] = map[string]int{}
	}
	got.Answers[name][status]++
}

// Addresses are of one length each, as the server is told them.
func dial(a, b int64) (*net.TCPConn, error) {
	from := &net.TCPAddr{IP: net.IPv4(127, 64, byte(100+a%150), byte(100+b%150))}
	dialer := net.Dialer{LocalAddr: from, Timeout: patience}
	connection, err := dialer.Dial("tcp", work.To)
	if err != nil {
		return nil, err
	}
	connection.SetDeadline(time.Now().Add(patience))
	return connection.(*net.TCPConn), nil
}

// One request of `length` bytes.
func hidden(target string, length int) string {
	start := "GET " + target + " HTTP/1.1\r\nHost: a\r\nX: "
	return start + strings.Repeat("x", length-len(start)-4) + "\r\n\r\n"
}

// Requests from end to end: one begins at the body's first byte, and one at each block of a server that has read a head of
// `before` bytes.
func body(k *kind, before int, run int64) []byte {
	size := 2*block + 512
	switch {
	case k.Bare:
		size = 4 * unit
	case run%16 == 15:
		size = 18 * block
	}
	text := hidden(k.Hidden, 2*unit+(block-before%block)%unit)
	return []byte(text + strings.Repeat(hidden(k.Hidden, unit), size/unit))
}

func framed(k *kind, data []byte, run int64) (string, []byte) {
	if k.Bare {
		return "\r\n", data
	}
	if !k.Chunked {
		return fmt.Sprintf("Content-Length: %d\r\n\r\n", k.More+len(data)), data
	}
	var chunks bytes.Buffer
	sizes := []int{len(data), unit, 3 * block / 2, 100}
	for size := sizes[run/4%4]; len(data) > 0; data = data[size:] {
		if size > len(data) {
			size = len(data)
		}
		fmt.Fprintf(&chunks, "%x\r\n%s\r\n", size, data[:size])
	}
	chunks.WriteString("0\r\n\r\n")
	return "Transfer-Encoding: chunked\r\n\r\n", chunks.Bytes()
}

// The next final answer; its body, and whether the connection goes on.
func answer(reader *bufio.Reader, method string) (*http.Response, string, error) {
	for {
		response, err := http.ReadResponse(reader, &http.Request{Method: method})
		if err != nil {
			return nil, "", err
		}
		text, err := io.ReadAll(response.Body)
		if response.StatusCode >= 200 || err != nil {
			return response, string(text), err
		}
	}
}

func numbered(head string, id string) string {
	return strings.ReplaceAll(strings.ReplaceAll(head, "{run}", id), "{key}", work.Key)
}

func newID() string {
	return fmt.Sprintf("%08d", number.Add(1))
}

// Whether a server's answer is one to this request: what it hides must not be answered, nor another's.
func belongs(text, id string) bool {
	return !strings.Contains(text, "hidden") && (!strings.Contains(text, `"run":`) || strings.Contains(text, `"run":"`+id+`"`))
}

func attack(k *kind, run int64) {
	connection, err := dial(run, run/150)
	if err != nil {
		trouble("%s: %v", k.Name, err)
		return
	}
	defer connection.Close()
	id := newID()
	framing, data := framed(k, body(k, k.Before, run), run)
	head := []byte(numbered(k.Head, id) + framing)
	reader := bufio.NewReader(connection)
	pieces := [][]byte{append(head, data...)}
	switch way := run % 4; way {
	case 1: // the head, and the body behind the answer
		pieces = [][]byte{head, data}
	case 2: // a part of the body, that ends between two requests, and the rest behind the answer
		at := len(data) - int(run/4%100)*unit
		if at < 1 || k.Chunked {
			at = len(data) / 2
		}
		pieces = [][]byte{append(head, data[:at]...), data[at:]}
	case 3: // in two writes
		connection.Write(head)
		pieces = [][]byte{data}
	}
	for i, piece := range pieces {
		if i > 0 {
			connection.SetReadDeadline(time.Now().Add(early))
			reader.Peek(1)
			connection.SetReadDeadline(time.Now().Add(patience))
		}
		connection.Write(piece) // an error shows in the answer
	}
	if run%8 == 4 { // leaves at once
		count(k.Name, "left")
		return
	}
	method, _, _ := strings.Cut(k.Head, " ")
	if k.More > 0 {
		connection.CloseWrite()
	}
	response, text, err := answer(reader, method)
	if err != nil {
		count(k.Name, "none")
		return
	}
	count(k.Name, response.Status[:3])
	if !belongs(text, id) {
		trouble("%s: %s is answered %s %.200q", k.Name, id, response.Status, text)
	}
	if !response.Close && k.More == 0 && !k.Bare {
		next(connection, reader, k)
	}
}

// One more request on the connection of one that hid some.
func next(connection *net.TCPConn, reader *bufio.Reader, k *kind) {
	id := newID()
	io.WriteString(connection, numbered("GET /next HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nX-Run: {run}\r\n\r\n", id))
	response, text, err := answer(reader, "GET")
	if err != nil {
		count(k.Name+", next", "none")
		return
	}
	count(k.Name+", next", response.Status[:3])
	if !belongs(text, id) {
		trouble("%s, next: %s is answered %s %.200q", k.Name, id, response.Status, text)
	}
}

// An honest client keeps its connection while it is let, and wants the server's own answer to each request.
func honest(client int64, turns <-chan bool) {
	connection, err := dial(client, 149)
	if err != nil {
		trouble("honest client %d: %v", client, err)
		return
	}
	reader := bufio.NewReader(connection)
	good := 0
	for range turns {
		if connection == nil {
			if connection, err = dial(client, 149); err != nil {
				trouble("honest client %d: %v", client, err)
				return
			}
			reader = bufio.NewReader(connection)
		}
		connection.SetDeadline(time.Now().Add(patience))
		closes, err := ask(connection, reader, client+int64(good))
		if err != nil {
			trouble("honest client %d, request %d: %v", client, good+1, err)
			break
		}
		good++
		if closes {
			connection.Close()
			connection = nil
		}
	}
	if connection != nil {
		connection.Close()
	}
	if good == asked {
		mutex.Lock()
		got.Honest++
		mutex.Unlock()
	}
}

func ask(connection *net.TCPConn, reader *bufio.Reader, which int64) (bool, error) {
	id := newID()
	method, size := "POST", []int{500, 6000, 200000, 0}[which%4]
	if size == 0 {
		method = "GET"
	}
	text := numbered(method+" /honest HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nX-Run: {run}\r\n", id)
	if size > 0 {
		text += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat(" ", size))
	} else {
		text += "\r\n"
	}
	written := make(chan bool)
	go func() {
		io.WriteString(connection, text) // an early answer may end it
		close(written)
	}()
	response, body, err := answer(reader, method)
	if err != nil {
		connection.Close()
		<-written
		return false, err
	}
	if response.Close {
		connection.Close()
	}
	<-written
	if want := fmt.Sprintf(`{"run":"%s","target":"/honest"}`, id); response.StatusCode != work.Status || body != want {
		return false, fmt.Errorf("answered %s %.200q in place of %d %q", response.Status, body, work.Status, want)
	}
	if response.Close && size == 0 {
		return true, errors.New("a GET ended the connection")
	}
	return response.Close, nil
}

func main() {
	if err := json.NewDecoder(os.Stdin).Decode(&work); err != nil {
		panic(err)
	}
	total := int64(work.Runs * len(work.Kinds))
	var at atomic.Int64
	var attackers, clients sync.WaitGroup
	turns := make([]chan bool, work.Honest)
	for i := range turns {
		turns[i] = make(chan bool, asked)
	}
	// Each honest client begins at its own place among the attacks, and asks again a hundredth further on.
	step := total / int64(work.Honest+asked)
	if step == 0 {
		step = 1
	}
	reached := func(n int64) {
		if n%step != 0 {
			return
		}
		for i := range turns {
			if place := n/step - int64(i); place >= 0 && place < asked {
				if place == 0 {
					clients.Add(1)
					go func(i int) {
						defer clients.Done()
						honest(int64(i), turns[i])
					}(i)
				}
				turns[i] <- true
				if place == asked-1 {
					close(turns[i])
				}
			}
		}
	}
	for i := 0; i < work.AtOnce; i++ {
		attackers.Add(1)
		go func() {
			defer attackers.Done()
			for n := at.Add(1) - 1; n < total; n = at.Add(1) - 1 {
				attack(&work.Kinds[n%int64(len(work.Kinds))], n/int64(len(work.Kinds)))
				mutex.Lock()
				if work.Honest > 0 {
					reached(int64(got.Runs))
				}
				got.Runs++
				mutex.Unlock()
			}
		}()
	}
	attackers.Wait()
	for n := total; work.Honest > 0 && n < step*int64(work.Honest+asked); n++ {
		reached(n)
	}
	clients.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(got); err != nil && !errors.Is(err, io.EOF) {
		panic(err)
	}
}
