// A static client and server in Go, which makes its system calls without a C library.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

func check(err error) {
	var number syscall.Errno
	if errors.As(err, &number) {
		fmt.Println(number.Error())
		os.Exit(1)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func main() {
	what, where := os.Args[1], os.Args[2]
	switch what {
	case "get":
		client := http.Client{Timeout: 20 * time.Second}
		answer, err := client.Get(where)
		check(err)
		_, err = io.Copy(os.Stdout, answer.Body)
		check(err)
	case "dial":
		conn, err := net.DialTimeout("tcp", where, 20*time.Second)
		check(err)
		fmt.Println(conn.LocalAddr(), conn.RemoteAddr())
	case "lookup":
		found, err := net.LookupHost(where)
		check(err)
		fmt.Println(found)
	case "datagram":
		conn, err := net.Dial("udp", where)
		check(err)
		_, err = conn.Write([]byte("hello"))
		check(err)
		buffer := make([]byte, 100)
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		size, err := conn.Read(buffer)
		check(err)
		fmt.Println(string(buffer[:size]))
	case "serve":
		listener, err := net.Listen("tcp", where)
		check(err)
		fmt.Println(listener.Addr())
		for {
			conn, err := listener.Accept()
			check(err)
			go func() {
				fmt.Fprintln(conn, conn.RemoteAddr())
				conn.Close()
			}()
		}
	}
}
